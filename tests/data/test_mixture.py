from __future__ import annotations

import random

import pytest

from grpo_mega.data.mixture import PromptStream, Schedule, shuffled
from grpo_mega.errors import CheckpointError, DataError
from grpo_mega.types import Prompt


def prompts(texts):
    return [Prompt(index=0, text=text, token_ids=(ord(text),), answer=text.upper()) for text in texts]


def stream(*sources, seed=3, weights=None):
    return PromptStream([prompts(texts) for texts in sources or ("abcde",)], seed=seed, weights=weights)


def text(several):
    return "".join(prompt.text for prompt in several)


def test_shuffled_is_a_permutation_that_no_platform_changes():
    # pinned: a resumed run must find the order it was saved in
    assert shuffled(10, "epoch", 0, 0) == [9, 8, 3, 1, 6, 0, 4, 2, 7, 5]
    assert sorted(shuffled(1000, "epoch", 0, 1)) == list(range(1000))
    assert shuffled(1000, "epoch", 0, 1) != shuffled(1000, "epoch", 1, 0)


def turns(weights, count):
    schedule = Schedule(weights)
    return [schedule.next() for _ in range(count)]


def test_whose_turn_it_is_by_hand():
    assert turns([1], 3) == [0, 0, 0]
    assert turns([1, 1], 4) == [0, 1, 0, 1]
    # shares 3/4 and 1/4: prompt j of the second may come at 4j and is due before 4j + 4
    assert turns([0.75, 0.25], 8) == turns([3, 1], 8) == [0, 0, 0, 1, 0, 0, 0, 1]
    assert turns([0.1, 0.2], 6) == [1, 0, 1, 1, 0, 1]


def test_no_source_is_ever_a_whole_prompt_ahead_or_behind():
    rng = random.Random(0)
    for _ in range(60):
        integers = [rng.choice([1, 1, 2, 5, rng.randint(1, 40)]) for _ in range(rng.randint(1, 8))]
        schedule, total = Schedule([w / 8 for w in integers]), sum(integers)
        for n in range(1, 2 * total + 1):
            schedule.next()
            assert sum(schedule.counts) == schedule.taken == n
            assert all(abs(c * total - w * n) < total for c, w in zip(schedule.counts, integers, strict=True))


def test_decimal_weights_are_exact():
    schedule = Schedule([0.1, 0.7, 0.2])
    for _ in range(1000):
        schedule.next()
    assert schedule.counts == [100, 700, 200]


def test_seeking_is_the_same_as_having_come_there():
    for weights in ([2, 3, 0.5], [0.3, 0.7], [1]):
        walked = Schedule(weights)
        for n in range(50):
            sought = Schedule(weights)
            sought.seek(n)
            assert (sought.taken, sought.counts) == (walked.taken, walked.counts) and walked.taken == n
            walked.next()


def test_an_epoch_holds_every_row_once_and_no_two_epochs_are_alike():
    drawn = stream().next(50)
    assert [prompt.index for prompt in drawn] == list(range(50))
    epochs = [text(drawn[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(epoch) == list("abcde") for epoch in epochs)
    assert len(set(epochs)) > 5
    assert all((p.token_ids, p.answer) == ((ord(p.text),), p.text.upper()) for p in drawn)


def test_one_source_is_the_permutation_of_seed_and_epoch():
    # pinned: prompt i is row shuffled(rows, "epoch", seed, epoch)[place], whatever the weight
    expected = "".join("abcde"[i] for epoch in range(4) for i in shuffled(5, "epoch", 3, epoch))
    assert text(stream().next(20)) == text(stream(weights=[0.3]).next(20)) == expected


def test_each_source_runs_through_epochs_of_its_own():
    drawn = stream("abcde", "xyz", weights=[0.25, 0.75]).next(80)
    assert [prompt.index for prompt in drawn] == list(range(80))
    small, large = text(p for p in drawn if p.text in "abcde"), text(p for p in drawn if p.text in "xyz")
    assert (len(small), len(large)) == (20, 60)
    assert all(sorted(small[i : i + 5]) == list("abcde") for i in range(0, 20, 5))
    assert all(sorted(large[i : i + 3]) == list("xyz") for i in range(0, 60, 3))
    # two sources of one size are not shuffled alike
    twins = stream("abcde", "ABCDE").next(40)
    assert text(twins[0::2]) != text(twins[1::2]).lower()


@pytest.mark.parametrize("sources", [("abcde",), ("abcde", "xyz", "pq")])
def test_the_stream_does_not_depend_on_how_it_is_drawn_and_does_on_the_seed(sources):
    whole, pieces = stream(*sources), stream(*sources)
    assert whole.next(24) == [prompt for count in (1, 7, 0, 13, 3) for prompt in pieces.next(count)]
    assert stream(*sources, seed=4).next(50) != stream(*sources, seed=3).next(50)


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_a_restored_stream_goes_on_where_it_was(taken):
    first, resumed = stream(), stream()
    first.next(taken)
    assert first.state() == {"cursor": taken, "rows": 5, "seed": 3}
    resumed.next(9)
    resumed.restore(first.state())
    assert resumed.next(11) == first.next(11)


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_restored_mixture_goes_on_where_each_source_was(taken):
    first, resumed = (stream("abcde", "xyz", "pq", weights=[0.5, 0.2, 1]) for _ in range(2))
    first.next(taken)
    assert first.state() == {"cursor": taken, "rows": [5, 3, 2], "weights": [0.5, 0.2, 1], "seed": 3}
    resumed.next(4)
    resumed.restore(first.state())
    assert resumed.next(40) == first.next(40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, r"has rows=4, this run's has rows=5, so prompts would repeat .*; resume with the training rows"),
        ({"rows": [5, 1], "weights": [1, 1]}, r"has rows=\[5, 1\], this run's has rows=5, "),
        ({"seed": 9}, r"has seed=9, this run's has seed=3, .*; resume with run.seed it was saved with"),
        ({"cursor": -1}, r"prompt cursor is -1, not a count; use another checkpoint"),
        ({"cursor": None}, r"prompt cursor is None"),
        ({"cursor": True}, r"prompt cursor is True"),
    ],
)
def test_the_state_of_another_stream_is_refused_and_changes_nothing(change, message):
    here = stream()
    here.next(2)
    with pytest.raises(CheckpointError, match=message):
        here.restore({"cursor": 4, "rows": 5, "seed": 3, **change})
    assert here.state()["cursor"] == 2


def test_other_weights_are_another_stream():
    state = stream("ab", "c", weights=[1, 2]).state()
    with pytest.raises(
        CheckpointError, match=r"has weights=\[1, 2\], this run's has weights=\[2, 1\], .*sources' weig"
    ):
        stream("ab", "c", weights=[2, 1]).restore(state)


def test_no_rows_no_stream():
    with pytest.raises(DataError, match="there are no training rows; give at least one for each source"):
        stream("ab", "")
