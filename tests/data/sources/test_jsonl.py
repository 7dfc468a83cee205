from __future__ import annotations

import json

import pytest

from grpo_mega.data.rows import Fields
from grpo_mega.data.sources.jsonl import read_jsonl
from grpo_mega.errors import DataError


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(bytes or a list of objects, prompt field, answer field) -> the rows of that file."""

    def load(content, prompt="prompt", answer="answer"):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
        return read_jsonl(str(path), Fields(prompt, answer, "data"), "data.jsonl")

    return load


def test_rows_keep_their_order_their_answer_and_everything_else(jsonl):
    entries = [{"q": "1+1", "a": 2, "prompt": "mine"}, {"q": "2+2", "a": "4"}, {"q": "why?"}, {"q": "half", "a": 0.5}]
    rows = jsonl(entries, "q", "a")
    assert [row["prompt"] for row in rows] == ["1+1", "2+2", "why?", "half"]
    assert [row["answer"] for row in rows] == ["2", "4", None, "0.5"]
    assert [row["origin"] for row in rows] == [f"train.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert [row["fields"] for row in rows] == entries


def test_a_final_newline_and_carriage_returns_are_no_lines(jsonl):
    rows = jsonl(b'{"prompt": "a"}\r\n{"prompt": "\xcf\x80"}\r\n')
    assert [row["prompt"] for row in rows] == ["a", "π"]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b"", r"train.jsonl:2: the line is empty; delete it"),
        (b"  ", r"train.jsonl:2: the line is empty; delete it"),
        (b'{"prompt": ', r"""train.jsonl:2: '\{"prompt":' is not JSON \(Expecting value.*\); write one JSON object"""),
        (b"[" * 100_000, r"train.jsonl:2: '\[+\.\.\.' is not JSON \(.*recursion.*\); write one JSON object"),
        (b"[1]", r"train.jsonl:2: '\[1\]' is not a JSON object; write \{\.\.\.\} on each line"),
        (b'{"q": "x", "a": 1}', r"train.jsonl:2: there is no field 'prompt' \(found: 'q', 'a'\); set data.prompt_fie"),
        (b"{}", r"train.jsonl:2: there is no field 'prompt' \(found: none\)"),
        (b'{"prompt": 7}', r"train.jsonl:2: 'prompt' is 7, not a text; write the prompt as a non-empty string"),
        (b'{"prompt": " "}', r"train.jsonl:2: 'prompt' is ' ', not a text; write the prompt"),
        (b'{"prompt": "\\ud83d"}', r"train.jsonl:2: 'prompt' holds half of a surrogate pair .*; write both halves"),
        (b'{"prompt": "\xff"}', r"train.jsonl:2: byte 0xff at column 13 is not UTF-8; save the file as UTF-8"),
        (b'{"prompt": "x", "answer": [1]}', r"train.jsonl:2: 'answer' is \[1\]; write the answer as a string"),
        (b'{"prompt": "x", "answer": {"a": 1}}', r"train.jsonl:2: 'answer' is \{'a': 1\}; write the answer as a"),
        (b'{"prompt": "x", "answer": true}', r"train.jsonl:2: 'answer' is True; write the answer as a string"),
        (b'{"prompt": "x", "answer": NaN}', r"train.jsonl:2: 'answer' is nan; write the answer as a string"),
    ],
)
def test_a_bad_line_is_named_with_what_it_holds_and_what_to_do(jsonl, second_line, message):
    with pytest.raises(DataError, match=message):
        jsonl(b'{"prompt": "fine"}\n' + second_line + b'\n{"prompt": "fine too"}\n')


def test_a_missing_file_a_folder_and_an_empty_file(jsonl, tmp_path):
    for name in ("gone.jsonl", "."):
        with pytest.raises(DataError, match=r"data.x=.* cannot be read \(.*\); give a file of one JSON object a line"):
            read_jsonl(str(tmp_path / name), Fields("prompt", "answer", "data"), "data.x")
    with pytest.raises(DataError, match=r"train.jsonl is empty; give a file"):
        jsonl(b"")
