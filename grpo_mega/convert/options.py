"""What the command was asked for, and what can be refused before anything is read."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo_mega.config import ParallelConfig
from grpo_mega.errors import ConfigError
from grpo_mega.model.formats.find import find_checkpoint

REPORT = "conversion_report.json"


@dataclass(frozen=True)
class Options:
    """parallel: the layout of megatron's side. dtype: of the destination's tensors (None: as the source has them).
    config: a Hugging Face folder whose config.json and tokenizer stand for those the source lacks."""

    source: Path
    destination: Path
    to: Literal["huggingface", "megatron"]
    parallel: ParallelConfig
    dtype: str | None = None
    config: Path | None = None
    names: Literal["te", "local"] = "te"
    skip_logits: bool = False
    overwrite: bool = False
    allow_pickle: bool = False

    def check(self) -> None:
        """Raise ConfigError for paths that cannot be a source and a destination."""
        if self.destination.exists() and not self.overwrite:
            raise ConfigError(f"{self.destination} exists; give another destination, or --overwrite to replace it")
        inside = self.destination.resolve()
        if inside == self.source.resolve() or inside in self.source.resolve().parents:
            raise ConfigError(
                f"{self.destination} is the source, or the source lies in it: it would be replaced; give another "
                "destination"
            )
        if self.destination.exists() and not self.destination.is_dir():
            raise ConfigError(f"{self.destination} is a file; give a folder that conversion may make")

    @property
    def ranks(self) -> int:
        """The fewest ranks on which megatron's side can run under its layout."""
        parallel = self.parallel
        slices = parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor
        return math.lcm(parallel.replica, slices * parallel.expert * parallel.pipeline)


def options_of(given: argparse.Namespace) -> Options:
    """The command line's words as options. Raises ConfigError."""
    axes = {axis: getattr(given, axis) for axis in ("tensor", "pipeline", "expert", "expert_tensor")}
    layout = {axis: size for axis, size in axes.items() if size is not None}
    for axis, size in layout.items():
        if size < 1:
            raise ConfigError(f"--{axis.replace('_', '-')}={size} is no number of ranks; give at least 1")
    return Options(
        source=given.source,
        destination=given.destination,
        to=given.to or ("huggingface" if is_megatron(given.source) or given.source.is_file() else "megatron"),
        parallel=ParallelConfig(**layout),
        dtype=given.dtype,
        config=given.config,
        names=given.names,
        skip_logits=given.skip_logits,
        overwrite=given.overwrite,
        allow_pickle=given.allow_pickle,
    )


def is_megatron(path: Path) -> bool:
    """Whether a folder is a checkpoint of Megatron's."""
    try:
        return path.is_dir() and find_checkpoint(path).kind != "huggingface"
    except ConfigError:
        return False  # what it is instead, its opening will say
