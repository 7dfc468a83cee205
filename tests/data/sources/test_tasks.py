from __future__ import annotations

import sys

import pytest

from grpo_mega.data.rows import Fields
from grpo_mega.data.sources.tasks import DEFAULT_TASK_SIZE, read_task
from grpo_mega.errors import DataError


def test_a_reasoning_gym_task_gives_its_own_entries():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rows = read_task("chain_sum", {"size": 40, "max_terms": 2}, 5, Fields("prompt", "answer", "data"))
    entries = reasoning_gym.create_dataset("chain_sum", seed=5, size=40, max_terms=2)
    assert len(rows) == 40
    for row, entry, i in zip(rows, entries, range(40), strict=True):
        assert (row["prompt"], row["answer"], row["fields"]) == (entry["question"], entry["answer"], entry)
        assert row["origin"] == f"chain_sum[{i}]"
    assert len(read_task("chain_sum", {}, 5, Fields("prompt", "answer", "data"))) == DEFAULT_TASK_SIZE


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("chain_sums", {}, r"data.x.reasoning_gym=chain_sums is no task of reasoning-gym; did you mean 'chain_sum'\?"),
        (
            "chain_sum",
            {"max_term": 2},
            r"data.x.task.max_term is no parameter of chain_sum; did you mean 'max_terms'\?",
        ),
        ("chain_sum", {"seed": 2}, r"data.x.task.seed=2: a task is seeded by run.seed; set that instead"),
        (
            "chain_sum",
            {"min_terms": 5, "max_terms": 2},
            r"does not suit .* chain_sum \(AssertionError: max_terms must be >= min_terms\); its parameters are",
        ),
        ("chain_sum", {"size": "many"}, r"data.x.task=\{'size': 'many'\} does not suit .*TypeError"),
        ("chain_sum", {"size": 0}, r"data.x.task=\{'size': 0\} (makes no problem|does not suit)"),
    ],
)
def test_a_task_that_does_not_exist_or_parameters_that_do_not_suit_it(name, parameters, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=message):
        read_task(name, parameters, 0, Fields("prompt", "answer", "data.x"))


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        DataError, match=r"needs the package reasoning-gym.*pip install reasoning-gym, or use data.json"
    ):
        read_task("chain_sum", {}, 0, Fields("prompt", "answer", "data"))


def test_an_answer_can_be_the_demonstration_of_a_task():
    pytest.importorskip("reasoning_gym")
    fields = Fields("prompt", "answer", "data", "answer", "required")
    for row in read_task("chain_sum", {"size": 3}, 5, fields):
        assert row["demonstration"] == row["answer"]
    with pytest.raises(
        DataError, match=r"data.reasoning_gym=chain_sum makes problems without demonstrations, which sa"
    ):
        read_task("chain_sum", {"size": 3}, 5, Fields("prompt", "answer", "data", None, "required"))
