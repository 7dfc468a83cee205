from __future__ import annotations

import json
import sys

import pytest

from grpo_mega.config import DataConfig
from grpo_mega.data.rows import load_rows, shuffled
from grpo_mega.errors import DataError


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(bytes or a list of objects, **data keys) -> load_rows of that file, seed 0, nothing held out by default."""

    def load(content, seed=0, **keys):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
        return load_rows(DataConfig(jsonl=str(path), **{"heldout": 0, **keys}), seed)

    return load


def test_rows_keep_their_order_their_answer_and_everything_else(jsonl):
    entries = [{"q": "1+1", "a": 2, "prompt": "mine"}, {"q": "2+2", "a": "4"}, {"q": "why?"}, {"q": "half", "a": 0.5}]
    rows, heldout = jsonl(entries, prompt_field="q", answer_field="a")
    assert heldout == []
    assert [row["prompt"] for row in rows] == ["1+1", "2+2", "why?", "half"]
    assert [row["answer"] for row in rows] == ["2", "4", None, "0.5"]
    assert [row["origin"] for row in rows] == [f"train.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert [row["fields"] for row in rows] == entries


def test_a_final_newline_and_carriage_returns_are_no_lines(jsonl):
    rows, _ = jsonl(b'{"prompt": "a"}\r\n{"prompt": "\xcf\x80"}\r\n')
    assert [row["prompt"] for row in rows] == ["a", "π"]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b"", r"train.jsonl:2: the line is empty; delete it"),
        (b"  ", r"train.jsonl:2: the line is empty; delete it"),
        (b'{"prompt": ', r"""train.jsonl:2: '\{"prompt":' is not JSON \(Expecting value.*\); write one JSON object"""),
        (b"[" * 100_000, r"train.jsonl:2: '\[+\.\.\.' is not JSON \(.*recursion.*\); write one JSON object"),
        (b"[1]", r"train.jsonl:2: '\[1\]' is not a JSON object; write \{\.\.\.\} on each line"),
        (b'{"q": "x", "a": 1}', r"train.jsonl:2: there is no field 'prompt' \(found: 'q', 'a'\); set"),
        (b"{}", r"train.jsonl:2: there is no field 'prompt' \(found: none\)"),
        (b'{"prompt": 7}', r"train.jsonl:2: 'prompt' is 7, not a text; write the prompt as a non-empty string"),
        (b'{"prompt": " "}', r"train.jsonl:2: 'prompt' is ' ', not a text; write the prompt"),
        (b'{"prompt": "\\ud83d"}', r"train.jsonl:2: 'prompt' holds half of a surrogate pair .*; write both halves"),
        (b'{"prompt": "\xff"}', r"train.jsonl:2: byte 0xff at column 13 is not UTF-8; save the file as UTF-8"),
        (b'{"prompt": "x", "answer": [1]}', r"train.jsonl:2: 'answer' is \[1\]; write the answer as a string"),
        (b'{"prompt": "x", "answer": true}', r"train.jsonl:2: 'answer' is True; write the answer as a string"),
    ],
)
def test_a_bad_line_is_named_with_what_it_holds_and_what_to_do(jsonl, second_line, message):
    with pytest.raises(DataError, match=message):
        jsonl(b'{"prompt": "fine"}\n' + second_line + b'\n{"prompt": "fine too"}\n')


def test_a_missing_file_a_folder_and_an_empty_file(jsonl, tmp_path):
    for name in ("gone.jsonl", "."):
        with pytest.raises(DataError, match=r"cannot be read \(.*\); give a file of one JSON object a line"):
            load_rows(DataConfig(jsonl=str(tmp_path / name)), 0)
    with pytest.raises(DataError, match=r"train.jsonl is empty; give a file"):
        jsonl(b"")


def test_held_out_prompts_are_distinct_and_never_trained_on(jsonl):
    entries = [{"prompt": f"{i % 7}+1", "row": i} for i in range(50)]
    rows, heldout = jsonl(entries, heldout=3)
    texts = {row["prompt"] for row in heldout}
    assert len(heldout) == len(texts) == 3
    assert [row["fields"] for row in rows] == [entry for entry in entries if entry["prompt"] not in texts]
    assert len(rows) > 4  # repeats stay within the training rows


def test_the_seed_alone_decides_what_is_held_out(jsonl):
    entries = [{"prompt": str(i)} for i in range(100)]
    first, again, other = (jsonl(entries, heldout=5, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again and first != other


def test_holding_out_everything_leaves_nothing_to_train_on(jsonl):
    with pytest.raises(DataError, match=r"data.heldout=2 takes every one of the 2 distinct prompts .*\(3 rows\)"):
        jsonl([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], heldout=2)


def test_shuffled_is_a_permutation_that_no_platform_changes():
    # pinned: a resumed run must find the order it was saved in
    assert shuffled(10, "epoch", 0, 0) == [9, 8, 3, 1, 6, 0, 4, 2, 7, 5]
    assert sorted(shuffled(1000, "epoch", 0, 1)) == list(range(1000))
    assert shuffled(1000, "epoch", 0, 1) != shuffled(1000, "epoch", 1, 0)

def task(name, seed=0, heldout=4, **parameters):
    return load_rows(DataConfig(reasoning_gym=name, task=parameters, heldout=heldout), seed)


def test_a_reasoning_gym_task_gives_its_own_entries():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rows, heldout = task("chain_sum", seed=5, size=40, max_terms=2)
    assert len(heldout) == 4 and 30 < len(rows) <= 36
    entries = reasoning_gym.create_dataset("chain_sum", seed=5, size=40, max_terms=2)
    for row in rows + heldout:
        entry = entries[int(row["origin"].removeprefix("chain_sum[").removesuffix("]"))]
        assert (row["prompt"], row["answer"], row["fields"]) == (entry["question"], entry["answer"], entry)


def test_one_digit_sums_repeat_but_none_is_both_held_out_and_trained_on():
    pytest.importorskip("reasoning_gym")
    rows, heldout = task("chain_sum", heldout=30, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert len(rows) + len(heldout) < 2000 and len(heldout) == 30  # the default size is 2000
    assert {row["prompt"] for row in rows}.isdisjoint(row["prompt"] for row in heldout)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("chain_sums", {}, r"data.reasoning_gym=chain_sums is no task of reasoning-gym; did you mean 'chain_sum'\?"),
        ("chain_sum", {"max_term": 2}, r"data.task.max_term is no parameter of chain_sum; did you mean 'max_terms'\?"),
        ("chain_sum", {"seed": 2}, r"data.task.seed=2: a task is seeded by run.seed; set that instead"),
        (
            "chain_sum",
            {"min_terms": 5, "max_terms": 2},
            r"does not suit .* chain_sum \(AssertionError: max_terms must be >= min_terms\); its parameters are",
        ),
        ("chain_sum", {"size": "many"}, r"data.task=\{'size': 'many'\} does not suit .*TypeError"),
    ],
)
def test_a_task_that_does_not_exist_or_parameters_that_do_not_suit_it(name, parameters, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(reasoning_gym=name, task=parameters), 0)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"needs the package reasoning-gym.*pip install reasoning-gym, or use"):
        task("chain_sum")
