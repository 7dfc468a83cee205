from __future__ import annotations

import json

import pytest

from grpo_mega.config import DataConfig
from grpo_mega.data.corpus import load_corpus
from grpo_mega.data.prompts import Renderer, prompts_of
from grpo_mega.data.rows import Row
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import ConfigError, DataError


def row(text, n=0, messages=None, shown=None):
    fields = {"prompt": text, "n": n}
    return Row(
        prompt=text,
        messages=messages,
        answer=text.upper(),
        demonstration=shown,
        origin=f"train.jsonl:{n + 1}",
        fields=fields,
    )


@pytest.fixture
def renderer(save_tokenizer):
    """renderer(template, max_completion_tokens, context_length, **data keys) -> (Renderer, its tokenizer): bytes."""

    def make(template=None, max_completion_tokens=10, context_length=1000, stops=None, **keys):
        tokenizer = load_tokenizer(save_tokenizer(template))
        return Renderer(
            DataConfig(jsonl="train.jsonl", **keys), tokenizer, max_completion_tokens, context_length, stops=stops
        ), tokenizer

    return make


def test_the_instruction_surrounds_the_prompt_and_other_braces_stay(renderer):
    render, tokenizer = renderer(instruction="Solve {prompt} in {braces} \\boxed{}.")
    prompt, overlong = render(row("{x}", 6), 11)
    assert prompt.text == "Solve {x} in {braces} \\boxed{}." and not overlong
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.index, prompt.answer, prompt.row) == (11, "{X}", {"prompt": "{x}", "n": 6})


def test_the_system_message_of_the_recipe_reaches_the_template(renderer):
    render, tokenizer = renderer("default", system="Be brief.")
    prompt, _ = render(row("2+2"), 0)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}
    assert prompt.text == "2+2" and prompt.token_ids == tokenizer.prompt_ids([system, user])


def chat(*contents):
    return tuple({"role": role, "content": content} for role, content in contents)


def test_of_a_chat_the_last_user_message_is_the_prompt_and_takes_the_instruction(renderer):
    render, tokenizer = renderer("default", instruction="Q: {prompt}")
    messages = chat(("user", "1+1"), ("assistant", "2"), ("user", "2+2"))
    prompt, _ = render(row("2+2", messages=messages), 0)
    assert prompt.text == "Q: 2+2"
    assert prompt.token_ids == tokenizer.prompt_ids([*messages[:2], {"role": "user", "content": "Q: 2+2"}])
    assert messages[-1]["content"] == "2+2"


def test_two_system_messages_are_one_too_many(renderer):
    messages = chat(("system", "Go."), ("user", "2+2"))
    own, tokenizer = renderer("default")
    assert own(row("2+2", messages=messages), 0)[0].token_ids == tokenizer.prompt_ids(messages)
    both, _ = renderer("default", system="Stop.")
    with pytest.raises(DataError, match=r"train.jsonl:1: the row has a system message, and so has the recipe .*Stop.*"):
        both(row("2+2", messages=messages), 0)


def test_what_the_template_refuses_is_told_with_its_row(renderer):
    render, _ = renderer("no_system")
    with pytest.raises(
        DataError, match=r"^train.jsonl:5: the chat template of .* failed \(System role not supported\)"
    ):
        render(row("2+2", 4, chat(("system", "Go."), ("user", "2+2"))), 0)


def test_a_prompt_may_fill_the_context_exactly_and_not_exceed_it(renderer):
    render, _ = renderer(max_completion_tokens=7, context_length=10)
    assert len(render(row("abc"), 0)[0].token_ids) == 3
    with pytest.raises(
        DataError,
        match=r"train.jsonl:5: the prompt has 4 tokens, with sampling.max_completion_tokens=7 too many for a context "
        r"of 10; remove the row, lower sampling.max_completion_tokens to 6, or set data.overlong to skip or trunc",
    ):
        render(row("abcd", 4), 0)
    with pytest.raises(
        DataError, match=r"train.jsonl:1: the prompt has 10 tokens.*; remove the row, or set data.overl"
    ):
        render(row("a" * 10), 0)


def test_a_limit_of_the_recipes_own(renderer):
    render, _ = renderer(max_prompt_tokens=2)
    assert len(render(row("ab"), 0)[0].token_ids) == 2
    with pytest.raises(
        DataError, match=r"train.jsonl:1: the prompt has 3 tokens, more than data.max_prompt_tokens=2; r"
    ):
        render(row("abc"), 0)


def test_a_long_prompt_is_skipped_or_keeps_its_last_tokens(renderer):
    skip, _ = renderer(max_prompt_tokens=3, overlong="skip")
    assert skip(row("abcd"), 0) == (None, True) and skip(row("abc"), 0)[0].text == "abc"
    cut, tokenizer = renderer("default", max_prompt_tokens=40, overlong="truncate_left", system="")
    whole = tokenizer.prompt_ids(chat(("system", ""), ("user", "x" * 50 + "2+2=")))
    prompt, overlong = cut(row("x" * 50 + "2+2="), 0)
    assert overlong and prompt.token_ids == whole[-40:] and prompt.text == "x" * 50 + "2+2="
    assert tokenizer.decode(prompt.token_ids).endswith("2+2=\nassistant\n")  # the template's end stays whole
    assert cut(row("2+2="), 0)[1] is False


def test_a_demonstration_is_as_long_as_a_completion_at_most_and_never_cut(renderer):
    refuse, _ = renderer(max_completion_tokens=4, stops=(256,), overlong="truncate_left", max_prompt_tokens=3)
    prompt, overlong = refuse(row("abcdef", shown="xyz"), 7)
    assert (prompt.index, prompt.text, len(prompt.token_ids), overlong) == (7, "abcdef", 3, True)
    assert len(prompt.demonstration.token_ids) == 4 and prompt.demonstration.token_ids[-1] == 256
    with pytest.raises(
        DataError,
        match=r"^train.jsonl:5: the demonstration has 5 tokens, the stop token among them, more than sampling.max_compl"
        r"etion_tokens=4; remove the row, raise that limit, or set data.overlong to skip",
    ):
        refuse(row("a", 4, shown="wxyz"), 0)
    skip, _ = renderer(max_completion_tokens=4, stops=(256,), overlong="skip")
    assert skip(row("a", shown="wxyz"), 0) == (None, True) and skip(row("a", shown="xyz"), 0)[0] is not None
    with pytest.raises(DataError, match=r"^train.jsonl:1: token 2 of the demonstration is '<\|endoftext\|>' \(256\)"):
        skip(row("a", shown="x<|endoftext|>"), 0)


def test_lengths_that_leave_no_room(renderer):
    with pytest.raises(
        ConfigError, match=r"sampling.max_completion_tokens=10 leaves no room for a prompt in a context "
    ):
        renderer(max_completion_tokens=10, context_length=10)
    assert renderer(max_completion_tokens=7, context_length=10, max_prompt_tokens=3)[0].limit == 3
    with pytest.raises(
        ConfigError, match=r"data.max_prompt_tokens=4 and sampling.max_completion_tokens=7 exceed a cont"
    ):
        renderer(max_completion_tokens=7, context_length=10, max_prompt_tokens=4)


def test_a_prompt_without_tokens_is_refused():
    class Silent:
        def prompt_ids(self, messages):
            return ()

    render = Renderer(DataConfig(jsonl="x"), Silent(), 1, 9)
    with pytest.raises(DataError, match=r"train.jsonl:1: 'a' has no tokens to go on from; remove the row"):
        render(row("a"), 0)


@pytest.fixture
def sources(tmp_path):
    def write(name, prompts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        return {"jsonl": str(tmp_path / name)}

    return [
        {**write("one.jsonl", ["a", "bbbb", "c", "ttt"]), "weight": 3},
        {**write("two.jsonl", ["ddddd", "e"]), "weight": 1},
    ], write("test.jsonl", ["ttt", "uuuuuu", "v"])


def built(renderer, sources, **keys):
    config = {"sources": sources[0], "heldout_source": sources[1], "max_prompt_tokens": 3, **keys}
    tokenizer = renderer()[1]
    data = DataConfig(**config)
    return prompts_of(load_corpus(data, 0), Renderer(data, tokenizer, 10, 100), seed=5)


def test_every_row_is_counted_once_and_told(renderer, sources):
    stream, heldout, counts = built(renderer, sources, overlong="skip")
    assert sorted(p.text for p in stream.next(8)) == list("aaacccee")
    assert [p.index for p in heldout] == [-1, -2] and {p.text for p in heldout} == {"ttt", "v"}
    one, two = counts.training
    assert (one.share, one.prompts, one.overlong, one.held_out) == (0.75, 2, 1, 1)
    assert (two.share, two.prompts, two.overlong, two.held_out) == (0.25, 1, 1, 0)
    assert (counts.heldout.prompts, counts.heldout.overlong) == (2, 1)
    assert counts.record() == {
        "training_prompts": 3, "heldout_prompts": 2, "overlong_prompts": 3, "training_rows_held_out": 1,
    }  # fmt: skip
    lines = [line.replace(sources[1]["jsonl"].removesuffix("test.jsonl"), "") for line in counts.lines()]
    assert lines == [
        "data: one.jsonl: 2 prompts, 1 over-long skipped, 1 rows with a held-out prompt left out; share 0.75",
        "data: two.jsonl: 1 prompts, 1 over-long skipped; share 0.25",
        "held out test.jsonl: 2 prompts, 1 over-long skipped",
    ]


def test_truncated_prompts_stay_and_are_counted(renderer, sources):
    stream, heldout, counts = built(renderer, sources, overlong="truncate_left")
    assert {"bbbb", "ddddd"} < {p.text for p in stream.next(16)} and len(heldout) == 3
    assert all(len(p.token_ids) <= 3 for p in (*stream.next(16), *heldout))
    assert [c.overlong for c in (*counts.training, counts.heldout)] == [1, 1, 1]
    assert "1 over-long truncated on the left" in counts.lines()[0]


def test_a_source_of_long_prompts_alone(renderer, sources):
    with pytest.raises(
        DataError, match=r"every prompt of .*one.jsonl \(3 rows\) has more than 3 tokens and is skipped; r"
    ):
        built(renderer, sources, overlong="skip", instruction="xxx{prompt}")
