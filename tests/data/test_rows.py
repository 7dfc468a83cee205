from __future__ import annotations

import json

import pytest

from grpo_mega.data.rows import Fields, problem, read_row
from grpo_mega.errors import DataError

USER, SYSTEM = {"role": "user", "content": "2+2"}, {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "4"}


def read(entry, prompt="prompt", answer="answer"):
    return read_row(entry, Fields(prompt, answer, "data.sources.1"), "full/train.jsonl:3", "train.jsonl:3")


def test_a_field_may_lie_within_another_and_a_name_with_a_dot_comes_first():
    entry = {"q": {"text": "2+2"}, "meta": {"gold": {"value": 4}}}
    row = read(entry, "q.text", "meta.gold.value")
    assert (row["prompt"], row["answer"], row["fields"], row["origin"]) == ("2+2", "4", entry, "train.jsonl:3")
    assert read({"q.text": "mine", "q": {"text": "2+2"}}, "q.text")["prompt"] == "mine"
    assert read(entry, "q.text", "meta.none")["answer"] is None
    with pytest.raises(DataError, match=r"full/train.jsonl:3: there is no field 'q.txt' \(found: 'q', 'meta'\); set d"):
        read(entry, "q.txt")


def test_a_chat_is_its_last_user_message_with_the_others_beside_it():
    row = read({"prompt": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "and 3+3?", "name": None}]})
    assert row["prompt"] == "and 3+3?"
    assert row["messages"] == (SYSTEM, USER, ASSISTANT, {"role": "user", "content": "and 3+3?"})
    tool = {"role": "tool", "content": "[1]", "name": "search"}
    assert read({"prompt": [USER, ASSISTANT, tool]})["messages"][-1] == tool
    assert read({"prompt": [USER]}) == {**read({"prompt": "2+2"}), "fields": {"prompt": [USER]}}


def test_the_same_problem_under_another_system_message_is_the_same_problem():
    plain, chat = read({"prompt": "2+2"}), read({"prompt": [SYSTEM, USER]})
    assert problem(plain) == problem(chat) == "2+2"
    longer = read({"prompt": [SYSTEM, {"role": "user", "content": "1+1"}, ASSISTANT, USER]})
    assert longer["prompt"] == "2+2" and json.loads(problem(longer))[-1] == ["user", "2+2"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["2+2"], r"train.jsonl:3: 'prompt\[0\]' is '2\+2'; write each message as \{role, content\}"),
        ([{"role": "user"}], r"'prompt\[0\]' has content=None, not a text; write each message"),
        ([SYSTEM, {"role": 1, "content": "x"}], r"'prompt\[1\]' has role=1, not a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"'prompt\[0\]' has content=\[\{'type': 'image'\}\], not"),
        ([{"role": "user", "content": " "}], r"'prompt\[0\].content' is ' ', not a text; write what the user says"),
        ([], r"'prompt' holds 0 messages, the last from None, which leaves the policy nothing to answer; end it"),
        ([USER, ASSISTANT], r"'prompt' holds 2 messages, the last from 'assistant', which .*; end it with the user's"),
        ([{"role": "tool", "content": "x"}], r"'prompt' holds 1 messages, the last from 'tool', which leaves"),
        ({"text": "2+2"}, r"'prompt' is \{'text': '2\+2'\}, not a text; write the prompt as a non-empty string or a"),
        (None, r"'prompt' is None, not a text"),
    ],
)
def test_prompts_of_another_kind_are_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        read({"prompt": prompt})


def demonstrated(entry, completion=None, demonstrations="required"):
    fields = Fields("prompt", "answer", "data", completion, demonstrations)
    return read_row(entry, fields, "full/train.jsonl:3", "train.jsonl:3")


def test_a_demonstration_is_a_field_or_the_assistants_last_word():
    row = demonstrated({"prompt": "2+2", "gold": {"text": " 4"}}, "gold.text")
    assert (row["prompt"], row["messages"], row["demonstration"]) == ("2+2", None, " 4")
    assert demonstrated({"prompt": "2+2", "answer": 4}, "answer")["demonstration"] == "4"
    last = {**ASSISTANT, "name": None}  # as a table has it
    row = demonstrated({"prompt": [SYSTEM, USER, last]})
    assert (row["prompt"], row["messages"], row["demonstration"]) == ("2+2", (SYSTEM, USER), "4")
    assert demonstrated({"prompt": [USER, last]})["messages"] is None
    turns = [USER, ASSISTANT, {"role": "user", "content": "3+3"}, {"role": "assistant", "content": "6"}]
    row = demonstrated({"prompt": turns})
    assert (row["messages"], row["demonstration"]) == (tuple(turns[:3]), "6")
    assert read({"prompt": "2+2", "completion": "4"})["demonstration"] is None


def test_held_out_rows_are_without_it_and_the_same_problem():
    entry = {"prompt": [USER, ASSISTANT]}
    held = demonstrated(entry, demonstrations="dropped")
    assert (held["messages"], held["demonstration"]) == (None, None)
    assert problem(held) == problem(demonstrated(entry)) == problem(read({"prompt": "2+2"}))


@pytest.mark.parametrize(
    ("entry", "completion", "message"),
    [
        ({"prompt": "2+2", "gold": "4"}, "completion", r"full/train.jsonl:3: there is no field 'completion' \(found: "
         r"'prompt', 'gold'\), and sampling.source=data trains on what it holds; set data.completion_field to one"),
        ({"prompt": "2+2", "gold": None}, "gold", r"full/train.jsonl:3: 'gold' is None, not a text; write what the po"),
        ({"prompt": "2+2", "gold": " "}, "gold", r"'gold' is ' ', not a text; write what the policy should write, or "),
        ({"prompt": "2+2"}, None, r"full/train.jsonl:3: 'prompt' does not end with a message of the assistant's, and .*"
         r"; end it so, or name the field of the demonstration in data.completion_field"),
        ({"prompt": [USER]}, None, r"'prompt' does not end with a message of the assistant's"),
        ({"prompt": [USER, {"role": "assistant", "content": ""}]}, None, r"'prompt\[-1\].content' is '', not a text; "),
        ({"prompt": [USER, {**ASSISTANT, "thinking": "."}]}, None, r"the last message of 'prompt' has 'thinking' besi"),
        ({"prompt": [ASSISTANT]}, None, r"'prompt' holds 0 messages, the last from None, which leaves the policy noth"),
        ({"prompt": [USER, ASSISTANT], "gold": "4"}, "gold", r"the last from 'assistant', which leaves the policy not"),
    ],
)  # fmt: skip
def test_rows_without_a_demonstration_are_refused(entry, completion, message):
    with pytest.raises(DataError, match=message):
        demonstrated(entry, completion)
