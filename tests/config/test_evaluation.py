"""The recipe's evaluation section: which k, of how many completions, and what decides that one is correct."""

from __future__ import annotations

import pytest

from grpo_mega.config import validate_recipe
from grpo_mega.errors import ConfigError

MATHS, TIDY, OWN = {"function": "math_verify"}, {"function": "format"}, {"function": "mine:score"}
SHORT, OTHER = {"function": "length"}, {"function": "mine:other"}
PATTERN = {"function": "regex", "options": {"pattern": "(a)"}}
GROUPED = {"function": "regex", "options": {"pattern": "(a)", "group": 1}}


def recipe(evaluation=None, reward=None, **sections):
    tree = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "run": {"directory": "r"}, **sections}
    return validate_recipe({**tree, "evaluation": evaluation or {}, "reward": reward or {}})


def test_defaults():
    plain = recipe()
    assert (plain.evaluation.completions, plain.evaluation.maj_at) == (4, ())
    assert plain.evaluation.passes(plain.reward) == (1,)
    undecided = recipe(reward={"parts": {"one": OWN, "two": OTHER}})
    assert undecided.evaluation.passes(undecided.reward) == ()  # and nobody asked for it
    assert plain.evaluation_sampling == plain.sampling
    assert plain.evaluation.correct_part(plain.reward) == "exact"
    assert recipe({"completions": 8, "pass_at": [1, 8], "maj_at": [8]}).evaluation.pass_at == (1, 8)


def test_its_own_way_of_sampling():
    training = {"temperature": 0.7, "top_p": 0.9, "max_completion_tokens": 32}
    own = recipe({"temperature": 0.3, "max_completion_tokens": 64}, sampling=training).evaluation_sampling
    assert (own.temperature, own.top_p, own.top_k, own.max_completion_tokens) == (0.3, 0.9, 0, 64)
    greedy = recipe({"temperature": 0, "completions": 1}, sampling=training).evaluation_sampling
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.max_completion_tokens) == (1.0, 1.0, 1, 32)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({"tidy": TIDY, "right": MATHS, "same": {"function": "exact"}}, "right"),  # the first that compares
        ({"judge": OWN, "tidy": TIDY, "short": SHORT}, "judge"),  # the only one that could tell
        ({"judge": OWN, "grouped": GROUPED}, "grouped"),
        ({"pattern": PATTERN, "short": SHORT}, "pattern"),
        ({"tidy": TIDY, "short": SHORT}, "tidy"),
    ],
)
def test_which_part_decides(parts, wanted):
    found = recipe(reward={"parts": parts})
    assert found.evaluation.correct_part(found.reward) == wanted
    for other in parts.keys() - {wanted, "short"}:
        named = recipe({"correct": other}, {"parts": parts})
        assert named.evaluation.correct_part(named.reward) == other


def test_where_nothing_asks_nothing_decides():
    found = recipe({"pass_at": []}, {"parts": {"one": OWN, "two": OTHER}})
    assert found.evaluation.correct_part(found.reward) is None
    assert recipe({}, {"parts": {"one": OWN, "two": OTHER}}, data={"jsonl": "d", "heldout": 0}).data.heldout == 0


@pytest.mark.parametrize(
    ("evaluation", "reward", "message"),
    [
        ({"pass_at": [1, 8]}, {},
         "evaluation.pass_at=[1, 8] and evaluation.completions=4: pass@8 is about 8 completions of one problem, and "
         "there are 4; set evaluation.completions=8 or more, or ask for a smaller k"),
        ({"completions": 2, "maj_at": [3]}, {}, "evaluation.maj_at=[3] and evaluation.completions=2: maj@3 is about "),
        ({"pass_at": [1, 2, 1]}, {}, "evaluation.pass_at=[1, 2, 1] names a k twice; leave one out"),
        ({"pass_at": [0]}, {}, "evaluation.pass_at.0=0 should be greater than or equal to 1"),
        ({"pass_at": 4}, {}, "evaluation.pass_at=4 should be a list"),
        ({"temperature": 0}, {},
         "evaluation.temperature=0 makes all evaluation.completions=4 of a problem the same one; set "),
        ({"correct": "exact", "pass_at": []}, {}, "evaluation.correct='exact' would never be used with pass_at=[] "),
        ({"temperature": -1}, {}, "evaluation.temperature=-1 should be greater than or equal to 0"),
        ({"correct": "rigth"}, {"parts": {"right": MATHS}},
         "evaluation.correct='rigth' is no part of the reward; did you mean 'right'?"),
        ({"correct": "short"}, {"parts": {"right": MATHS, "short": SHORT}},
         "evaluation.correct='short' names a part whose value says how good or long a completion is, not whether "),
        ({"pass_at": [1]}, {"parts": {"one": OWN, "two": OTHER}},
         "evaluation.pass_at=[1] asks which completions are correct, and the reward (one, two) does not say it: no "
         "part compares with the answer; name in evaluation.correct the part whose value of 1 means correct, or set "
         "evaluation.pass_at=[]"),
        ({"pass_at": [1]}, {"function": "length"},
         "evaluation.pass_at=[1] asks which completions are correct, and the reward (length) does not"),
        ({"maj_at": [4]}, {"parts": {"judge": OWN}},
         "evaluation.maj_at=[4] counts answers, and reward.parts.judge.function=mine:score finds none in a completion; "
         "leave maj_at out, or name in evaluation.correct a part of exact, math_verify, reasoning_gym or regex with a "
         "group"),
        ({"maj_at": [4]}, PATTERN, "evaluation.maj_at=[4] counts answers, and reward.function=regex finds none"),
    ],
)  # fmt: skip
def test_what_is_refused(evaluation, reward, message):
    with pytest.raises(ConfigError) as caught:
        recipe(evaluation, reward)
    assert str(caught.value).removeprefix("recipe: ").startswith(message), str(caught.value)


def test_keys_that_would_never_be_used():
    with pytest.raises(ConfigError, match=r"evaluation\.completions=8 would never be used with data\.heldout=0; hold "):
        recipe({"completions": 8}, data={"jsonl": "d", "heldout": 0})


def test_a_recipe_that_only_evaluates():
    found = recipe(data={"heldout_source": {"jsonl": "test"}, "prompt_field": "question"})
    assert not found.data.trains and recipe().data.trains
    with pytest.raises(ConfigError, match=r"no source is given; give exactly one of data\.jsonl"):
        recipe(data={"heldout_source": {"jsonl": "test"}, "split": "train"})
