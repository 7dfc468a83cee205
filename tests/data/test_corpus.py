from __future__ import annotations

import json

import pytest

from grpo_mega.config import DataConfig
from grpo_mega.data.corpus import load_corpus
from grpo_mega.errors import DataError


@pytest.fixture
def write(tmp_path):
    """write(name, prompts) -> the path of a JSONL file of them, each with its number."""

    def write(name, prompts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": p, "n": n}) + "\n" for n, p in enumerate(prompts)))
        return str(path)

    return write


def texts(rows):
    return [row["prompt"] for row in rows]


def test_held_out_prompts_are_distinct_and_never_trained_on(write):
    path = write("train.jsonl", [f"{i % 7}+1" for i in range(50)])
    corpus = load_corpus(DataConfig(jsonl=path, heldout=3), 0)
    (part,) = corpus.training
    held = set(texts(corpus.heldout))
    assert len(corpus.heldout) == len(held) == 3
    assert [row["fields"]["n"] for row in part.rows] == [i for i in range(50) if f"{i % 7}+1" not in held]
    assert part.held_out == 50 - len(part.rows) and len(part.rows) > 4  # repeats stay within the training rows
    assert [*corpus.rows()] == [*part.rows, *corpus.heldout]


def test_the_seed_alone_decides_what_is_held_out(write):
    config = DataConfig(jsonl=write("train.jsonl", map(str, range(100))), heldout=5)
    first, again, other = (load_corpus(config, seed).heldout for seed in (1, 1, 2))
    assert first == again and first != other


def test_holding_out_everything_leaves_nothing_to_train_on(write):
    config = DataConfig(jsonl=write("train.jsonl", "aba"), heldout=2)
    with pytest.raises(DataError, match=r"data.heldout=2 takes every one of the 2 distinct prompts .*\(3 rows\)"):
        load_corpus(config, 0)


def test_what_is_held_out_of_one_source_is_held_out_of_all(write):
    sources = [{"jsonl": write("one.jsonl", "abcabc"), "weight": 3}, {"jsonl": write("two.jsonl", "cdef")}]
    corpus = load_corpus(DataConfig(sources=sources, heldout=4), 1)
    held = set(texts(corpus.heldout))
    assert len(held) == 4 and held < set("abcdef")
    assert [texts(part.rows) for part in corpus.training] == [
        [text for text in "abcabc" if text not in held],
        [text for text in "cdef" if text not in held],
    ]
    assert [part.source.weight for part in corpus.training] == [3.0, 1.0]


def test_a_held_out_source_gives_all_it_has_and_takes_its_texts_out_of_training(write):
    train, test = write("train.jsonl", "abcdea"), write("test.jsonl", "axyx")
    corpus = load_corpus(DataConfig(jsonl=train, heldout_source={"jsonl": test}), 0)  # at most 64
    assert sorted(texts(corpus.heldout)) == ["a", "x", "y"]
    (part,) = corpus.training
    assert (texts(part.rows), part.held_out) == (list("bcde"), 2)
    # asked for fewer, the others' texts still stay out
    fewer = [load_corpus(DataConfig(jsonl=train, heldout=1, heldout_source={"jsonl": test}), seed) for seed in range(9)]
    assert {len(corpus.heldout) for corpus in fewer} == {1}
    assert {text for corpus in fewer for text in texts(corpus.heldout)} > {"x"}
    assert all(texts(corpus.training[0].rows) == list("bcde") for corpus in fewer)
    with pytest.raises(DataError, match=r"every one of the 2 rows of .*same.jsonl has a held-out prompt, .*; hold out"):
        load_corpus(DataConfig(jsonl=write("same.jsonl", "aa"), heldout_source={"jsonl": test}), 0)


def test_a_chat_and_a_text_that_ask_the_same_are_one_problem(tmp_path, write):
    chat = [{"role": "system", "content": "Go."}, {"role": "user", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"chat": chat}) + "\n")
    heldout = {"jsonl": str(tmp_path / "chat.jsonl"), "prompt_field": "chat"}
    corpus = load_corpus(DataConfig(jsonl=write("train.jsonl", "abc"), heldout_source=heldout), 0)
    assert texts(corpus.heldout) == ["b"] and texts(corpus.training[0].rows) == ["a", "c"]


def test_each_source_has_fields_of_its_own_and_the_sections_otherwise(tmp_path, write):
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "q", "gold": 1, "n": 7}) + "\n")
    sources = [
        {"jsonl": write("train.jsonl", "ab")},
        {"jsonl": str(tmp_path / "other.jsonl"), "prompt_field": "question", "answer_field": "gold"},
    ]
    one, two = load_corpus(DataConfig(sources=sources, heldout=0, answer_field="n"), 0).training
    assert [row["answer"] for row in one.rows] == ["0", "1"]
    assert [(row["prompt"], row["answer"]) for row in two.rows] == [("q", "1")]
    bad = {"jsonl": str(tmp_path / "other.jsonl")}
    with pytest.raises(
        DataError, match=r"there is no field 'prompt' .*; set data.sources.1.prompt_field to one of them"
    ):
        load_corpus(DataConfig(sources=[sources[0], bad]), 0)
    with pytest.raises(DataError, match=r"there is no field 'prompt' .*; set data.heldout_source.prompt_field to one"):
        load_corpus(DataConfig(**sources[0], heldout_source=bad), 0)


def test_one_digit_sums_repeat_but_none_is_both_held_out_and_trained_on():
    pytest.importorskip("reasoning_gym")
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    corpus = load_corpus(DataConfig(reasoning_gym="chain_sum", task=task, heldout=30), 0)
    (part,) = corpus.training
    assert len(part.rows) + len(corpus.heldout) < 2000 and len(corpus.heldout) == 30  # the default size is 2000
    assert set(texts(part.rows)).isdisjoint(texts(corpus.heldout))
