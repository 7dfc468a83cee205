"""Mistral (arXiv:2310.06825): Llama whose layers may see a window of the past only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_mega.model.families import llama
from grpo_mega.model.families.table import Family


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    window = raw.get("sliding_window", 4096)
    return {"windows": (window,) * int(raw["num_hidden_layers"])} if window else {}


FAMILY = Family("Mistral", read, llama.layer)
