"""The layouts that are tried, each under a name that says all of it: "moe-tp2-sp-dp2-ep2", "tp2-pp2-ref=tp4"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.config.base import nearest
from grpo_mega.errors import ConfigError
from grpo_mega.objective.normalization import NORMALIZATIONS

AXES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert",
        "etp": "expert_tensor"}  # fmt: skip
WORDS = ("moe", "sp", "full", "selective", "dist", "overlap", "single")
NUMBERED = (*AXES, "dp", "rows", "mini", "mu")
TIMEOUT_S = 300.0  # for a collective: a layout that hangs is one that breaks
PACKED_ROWS = 1000  # all sequences of a data rank in one microbatch

# world size -> names. `brief` is what the default tests hold; `--all` tries everything
BRIEF = {
    1: "full selective single rows32 moe-rows32",
    2: "tp2 tp2-sp pp2 pp2-vpp2-rows32 cp2 dp2-dist-overlap dp2-mini2-mu2 moe-dp2-ep2 moe-tp2-sp",
    4: "tp2-pp2-sp-ref=tp4 tp2-cp2 dp2-pp2-vpp2 moe-tp2-sp-dp2-ep2 moe-dp4-ep2-dist",
}
MORE = {
    1: "rows64 moe-full token group_token constant mini2-mu2",
    2: "tp2-full tp2-sp-selective-rows32 pp2-rows32 pp2-single pp2-vpp2 cp2-rows64 cp2-full cp2-single dp2 dp2-dist "
    "dp2-single dp2-rows32 dp2-token dp2-group_token dp2-constant cp2-token tp2-constant pp2-group_token "
    "tp2-mini2-mu2 cp2-mini2-mu2 dp2-dist-mini2-mu2 pp2-ref=tp2 cp2-ref=dp2 dp2-ref=cp2 "
    "moe-dp2 moe-pp2 moe-cp2 moe-cp2-ep2 moe-dp2-ep2-full moe-dp2-ep2-dist moe-tp2-sp-etp1-ep2 "
    "moe-dp2-ep2-ref=tp2+sp moe-tp2-sp-ref=ep2",
    4: "tp4 tp4-sp pp4 pp4-rows32 cp4 dp4-dist dp4-dist-overlap tp2-dp2 tp2-sp-dp2-dist pp2-cp2 pp2-dp2-rows32 "
    "pp2-vpp2-cp2-rows32 cp2-dp2-dist dp4-ref=tp2+pp2 tp2-pp2-ref=tp4+sp dp4-token tp2-cp2-group_token "
    "tp2-sp-cp2-mini2-mu2 moe-dp4-ep4 moe-pp2-dp2-ep2 moe-cp2-dp2-ep2 moe-tp2-sp-dp2-etp1-ep4 moe-tp2-sp-dp2-ep2-dist",
    8: "tp2-pp2-dp2 tp2-sp-cp2-dp2 tp2-cp2-dp2 pp2-vpp2-dp4-rows32 pp2-vpp2-cp2-dp2 tp4-sp-pp2 pp4-dp2-rows32 cp4-dp2 "
    "dp8-dist tp2-sp-pp2-vpp2-cp2-rows32 tp2-pp2-cp2-ref=tp4+dp2 moe-tp2-sp-pp2-dp2-ep2 moe-dp8-ep4-dist "
    "moe-tp2-sp-cp2-dp2-ep2",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row: a layout, and how the batch is cut and used under it."""

    name: str
    model: str = "dense"
    parallel: dict[str, Any] = field(default_factory=dict)  # keys of the recipe's section
    data: int = 1
    reference: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    distributed: bool = False
    rows: int = PACKED_ROWS
    minibatches: int = 1
    iterations: int = 1
    normalization: str = "sequence"

    @property
    def world(self) -> int:
        return self.data * math.prod(self.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context"))

    @property
    def problem(self) -> tuple[str, str, int, int]:
        """What is to be computed, whatever the layout."""
        return self.model, self.normalization, self.minibatches, self.iterations


def parse(name: str) -> Case:
    """The case of that name. Raises ConfigError for a word that is none of ours."""
    settings: dict[str, Any] = {"name": name}
    parallel: dict[str, Any] = {}
    for word in name.split("-"):
        if word.startswith("ref="):
            settings["reference"] = _reference(word.removeprefix("ref="), name)
            continue
        found = re.fullmatch(r"([a-z]+)([1-9][0-9]*)", word)
        if found and found[1] in NUMBERED:
            key, number = found[1], int(found[2])
            where = {"dp": "data", "rows": "rows", "mini": "minibatches", "mu": "iterations"}.get(key)
            (parallel if where is None else settings)[where or AXES[key]] = number
        elif word in NORMALIZATIONS:
            settings["normalization"] = word
        elif word in WORDS:
            _set_word(word, settings, parallel)
        else:
            known = (*WORDS, *NORMALIZATIONS, *(f"{key}N" for key in NUMBERED), "ref=LAYOUT")
            raise ConfigError(f"--layouts {name}: {word!r} says nothing{nearest(word, known)}")
    return Case(parallel=parallel, **settings)


def _set_word(word: str, settings: dict[str, Any], parallel: dict[str, Any]) -> None:
    match word:
        case "moe":
            settings["model"] = "moe"
        case "sp":
            parallel["sequence"] = True
        case "dist":
            settings["distributed"] = True
        case "overlap":
            parallel["overlap"] = True
        case "single":  # a capacity that no sequence keeps: each has a microbatch of its own
            settings["rows"] = 1
        case _:
            settings["recompute"] = word


def _reference(words: str, name: str) -> dict[str, Any]:
    """The reference's layout: "tp2+pp2"; data ranks are what is left ("dp2" says so)."""
    inner = parse(words.replace("+", "-"))
    allowed = {key: value for key, value in inner.parallel.items() if key not in ("virtual_pipeline", "overlap")}
    if allowed != inner.parallel:
        raise ConfigError(
            f"--layouts {name}: a reference has tpN, ppN, cpN, epN, etpN and sp; drop the rest of ref={words}"
        )
    return allowed or {"tensor": 1}


def cases(names: Iterable[str] | None, everything: bool) -> list[Case]:
    """The named cases, or those of the tables, by world size."""
    if names is not None:
        return sorted((parse(name) for name in names), key=lambda case: case.world)
    tables = [BRIEF, MORE] if everything else [BRIEF]
    found = [parse(name) for world in (1, 2, 4, 8) for table in tables for name in table.get(world, "").split()]
    return sorted(found, key=lambda case: case.world)
