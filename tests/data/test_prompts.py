from __future__ import annotations

import pytest

from grpo_mega.config import DataConfig
from grpo_mega.data.prompts import PromptStream, Renderer, heldout_prompts
from grpo_mega.data.rows import Row
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import CheckpointError, DataError
from grpo_mega.types import Prompt


def row(text, n=0):
    return Row(prompt=text, answer=text.upper(), origin=f"train.jsonl:{n + 1}", fields={"prompt": text, "n": n})


ROWS = [row(text, n) for n, text in enumerate("abcde")]


def render(row, index):
    return Prompt(index=index, text=row["prompt"], token_ids=(ord(row["prompt"]),), answer=row["answer"])


def stream(rows=ROWS, seed=3):
    return PromptStream(rows, render, seed=seed)


def text(prompts):
    return "".join(prompt.text for prompt in prompts)


def test_an_epoch_holds_every_row_once_and_no_two_epochs_are_alike():
    prompts = stream().next(50)
    assert [prompt.index for prompt in prompts] == list(range(50))
    epochs = [text(prompts[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(epoch) == list("abcde") for epoch in epochs)
    assert len(set(epochs)) > 5
    assert all((p.token_ids, p.answer) == ((ord(p.text),), p.text.upper()) for p in prompts)


def test_the_stream_does_not_depend_on_how_it_is_drawn_and_does_on_the_seed():
    whole, pieces = stream(), stream()
    assert whole.next(24) == [prompt for count in (1, 7, 0, 13, 3) for prompt in pieces.next(count)]
    assert stream(seed=4).next(50) != stream(seed=3).next(50)


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_a_restored_stream_goes_on_where_it_was(taken):
    first, resumed = stream(), stream()
    first.next(taken)
    assert first.state() == {"cursor": taken, "rows": 5, "seed": 3}
    resumed.next(9)
    resumed.restore(first.state())
    assert resumed.next(11) == first.next(11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, r"has rows=4, this run's has rows=5, so prompts would repeat .*; resume with the training rows"),
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


def test_no_rows_no_stream():
    with pytest.raises(DataError, match="there are no training rows; give at least one"):
        stream(rows=[])


def test_heldout_indices_are_negative_and_distinct():
    assert [(p.index, p.text) for p in heldout_prompts(ROWS[:3], render)] == [(-1, "a"), (-2, "b"), (-3, "c")]


def renderer(save_tokenizer, *, max_completion_tokens=10, context_length=1000, template=None, **keys):
    tokenizer = load_tokenizer(save_tokenizer(template))
    config = DataConfig(jsonl="train.jsonl", **keys)
    return Renderer(config, tokenizer, max_completion_tokens=max_completion_tokens, context_length=context_length)


def test_the_instruction_surrounds_the_prompt_and_other_braces_stay(save_tokenizer):
    renders = renderer(save_tokenizer, instruction="Solve {prompt} in {braces} \\boxed{}.")
    prompt = renders(row("{x}", 6), 11)
    assert prompt.text == "Solve {x} in {braces} \\boxed{}."
    assert renders.tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.index, prompt.answer, prompt.row) == (11, "{X}", {"prompt": "{x}", "n": 6})


def test_the_system_message_of_the_recipe_reaches_the_template(save_tokenizer):
    prompt = renderer(save_tokenizer, template="default", system="Be brief.")(row("2+2"), 0)
    tokenizer = load_tokenizer(save_tokenizer("default"))
    assert prompt.text == "2+2" and prompt.token_ids == tokenizer.prompt_ids("2+2", "Be brief.")


def test_a_prompt_may_fill_the_context_exactly_and_not_exceed_it(save_tokenizer):
    renders = renderer(save_tokenizer, max_completion_tokens=7, context_length=10)
    assert len(renders(row("abc"), 0).token_ids) == 3
    with pytest.raises(
        DataError,
        match=r"train.jsonl:5: the prompt has 4 tokens, with sampling.max_completion_tokens=7 too many for a context "
        r"of 10; remove the row, or lower sampling.max_completion_tokens to 6",
    ):
        PromptStream([row("abc"), row("abcd", 4)], renders, seed=0)
    with pytest.raises(DataError, match=r"train.jsonl:1: the prompt has 10 tokens.*; remove the row$"):
        heldout_prompts([row("a" * 10)], renders)


def test_a_prompt_without_tokens_is_refused():
    class Silent:
        def prompt_ids(self, text, system):
            return ()

    renders = Renderer(DataConfig(jsonl="x"), Silent(), max_completion_tokens=1, context_length=9)
    with pytest.raises(DataError, match=r"train.jsonl:1: 'a' has no tokens to go on from; remove the row"):
        renders(row("a"), 0)
