"""A row is broken where one of its numbers is out of bounds, and says which tensor comes first."""

from __future__ import annotations

import pytest

from grpo_mega.selftest.table import broken, line, verdict

GOOD = {
    "case": "tp2", "logprob": 1e-7, "loss": 0.0, "same": 95, "drawn": 96, "near": 1, "seconds": 1.0,
    "gradients": {"a": 1e-7, "b": 2e-7}, "parameters": {"a": 1e-7, "b": 0.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"logprob": 3e-6}, "log-probs are off by 3.0e-06 of the largest"),
        ({"loss": 1.0}, "the loss is off by 1.0e+00 of the largest"),
        ({"gradients": {"a": 0.0, "b": 3e-6, "c": 1.0}}, "gradient of b is off by 3.0e-06"),
        ({"parameters": {"a": float("inf")}}, "parameter of a is off by inf"),
        ({"same": 94}, "2 of 96 completions differ; 1 draws were near"),
        ({"logprob": float("nan")}, "log-probs are off by nan of the largest"),
    ],
)
def test_what_breaks(change, words):
    row = GOOD | change
    assert broken(row, "fp32") == words
    assert ("<-" in line(row, "fp32")) == (words is not None)


def test_bf16_may_draw_otherwise_but_not_compute_otherwise():
    assert broken(GOOD | {"same": 1}, "bf16") is None
    assert broken(GOOD | {"gradients": {"a": 0.2}}, "bf16") == "gradient of a is off by 2.0e-01"


def test_the_verdict_names_the_first():
    bad = GOOD | {"case": "cp2", "error": "it hung"}
    assert verdict([GOOD, bad], bad, "fp32") == "1 of 2 layouts break; the first is cp2: it hung"
    assert verdict([GOOD], None, "fp32") == "1 layouts compute what one process computes (1 draws were near a boundary)"
