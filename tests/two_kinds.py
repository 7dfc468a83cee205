"""The learning tests' task: two bytes, an ASCII one and another, in the order that the prompt's first letter asks for.

Half a point each. Who ignores the prompt earns half; who learns the second byte alone earns three quarters; who learns
to repeat what it has just written earns half. Only a policy that reads its prompt and tells the two places apart passes
the bar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

WINDOW = 5  # the mean reward of the last steps is compared with that of the first
START, BAR = 0.6, 0.8  # it starts below one and must end above the other


def wanted(answer):
    return (True, False) if answer == "ascii first" else (False, True)


def two_kinds(text, answer, row):
    return sum(byte.isascii() == kind for byte, kind in zip(text, wanted(answer), strict=False)) / 2


def each_byte(steps, answer, row):
    """The same, a step a byte."""
    kinds = (*wanted(answer), *[None] * len(steps))
    return [float(step != "" and step.isascii() == kind) for step, kind in zip(steps, kinds, strict=False)]


def make_task(folder: Path) -> dict[str, Any]:
    """A model and data, as the recipe's sections that name them."""
    model = tiny.make_model(
        folder / "model", num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tied=False, scale=0.2,
    )  # fmt: skip
    kinds = ("a", "ascii first"), ("b", "ascii last")
    rows = [{"prompt": letter + "x" * n, "answer": answer} for n in range(5) for letter, answer in kinds]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": {"path": str(model)}, "data": {"jsonl": str(data), "heldout": 0}}


def ends(metrics):
    """Mean reward of the first and of the last steps."""
    rewards = [line["reward"] for line in metrics]
    return sum(rewards[:WINDOW]) / WINDOW, sum(rewards[-WINDOW:]) / WINDOW
