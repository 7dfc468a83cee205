"""The bounds, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """What a dtype's rounding may change, and no more."""

    logprob: float  # of the largest log-prob
    loss: float  # of the largest loss
    gradient: float  # |found - wanted| / |wanted|, of each tensor
    parameter: float
    exact_completions: bool  # but for draws near a boundary


BOUNDS = {
    # megatron divides gradients once, by a float32: 6e-8 where R is no power of two
    "fp64": Bounds(1e-10, 1e-9, 1e-7, 1e-10, True),
    "fp32": Bounds(2e-6, 2e-6, 2e-6, 2e-6, True),
    # 8 bits a number: the same distribution and the same noise, not the same draws
    "bf16": Bounds(2e-2, 2e-2, 5e-2, 3e-2, False),
}


def broken(row: dict[str, Any], dtype: str) -> str | None:
    """What of a row is out of bounds, and by how much; None if nothing."""
    if "error" in row:
        return row["error"]
    bounds = BOUNDS[dtype]
    if not row["logprob"] <= bounds.logprob:  # nan is out of bounds
        return f"log-probs are off by {row['logprob']:.1e} of the largest"
    kinds = (("gradients", bounds.gradient), ("parameters", bounds.parameter))
    for kind, bound in kinds:  # in the order of cause and effect
        if kind == "parameters" and not row["loss"] <= bounds.loss:
            return f"the loss is off by {row['loss']:.1e} of the largest"
        for name, off in row[kind].items():
            if not off <= bound:
                return f"{kind[:-1]} of {name} is off by {off:.1e}"
    if bounds.exact_completions and row["drawn"] - row["same"] > row["near"]:
        return f"{row['drawn'] - row['same']} of {row['drawn']} completions differ; {row['near']} draws were near"
    return None


def heading(dtype: str) -> str:
    bounds = BOUNDS[dtype]
    bound = f"bounds, {dtype}"
    return (
        f"{'layout':34}{'log-prob':>10}{'loss':>10}{'gradient':>10}{'parameter':>11}{'completions':>13}{'s':>7}\n"
        f"{bound:34}{bounds.logprob:>10.0e}{bounds.loss:>10.0e}{bounds.gradient:>10.0e}{bounds.parameter:>11.0e}{'same':>13}"
    )


def line(row: dict[str, Any], dtype: str) -> str:
    mark = "  <- " + words if (words := broken(row, dtype)) else ""
    if "error" in row:
        return f"{row['case']:34}{mark}"
    worst = {kind: max(row[kind].values(), default=0.0) for kind in ("gradients", "parameters")}
    same = f"{row['same']}/{row['drawn']}"
    return (
        f"{row['case']:34}{row['logprob']:>10.1e}{row['loss']:>10.1e}{worst['gradients']:>10.1e}"
        f"{worst['parameters']:>11.1e}{same:>13}{row['seconds']:>7.1f}{mark}"
    )


def verdict(rows: Sequence[dict[str, Any]], bad: dict[str, Any] | None, dtype: str) -> str:
    if bad is None:
        near = sum(row["near"] for row in rows)
        return f"{len(rows)} layouts compute what one process computes ({near} draws were near a boundary)"
    count = sum(broken(row, dtype) is not None for row in rows)
    return f"{count} of {len(rows)} layouts break; the first is {bad['case']}: {broken(bad, dtype)}"
