"""The source of a conversion: whatever it is, tensors under Hugging Face's names, each read counted."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.convert.options import REPORT
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats import Weights, config_of, open_found
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.model.names import shapes

TIED = ("model.embed_tokens.weight", "lm_head.weight")
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass
class Source:
    """An opened source. kind: "huggingface", "gguf" or "megatron"; folder: where config.json and the tokenizer are."""

    path: Path
    kind: str
    weights: Weights
    read_numbers: dict[str, int] = field(default_factory=dict)  # by tensor, how many numbers have been read
    arch: Architecture = field(init=False)

    def __post_init__(self) -> None:
        self.arch = self.weights.arch

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Weights.read`; counted."""
        value = self.weights.read(name, dim, start, length)
        self.read_numbers[name] = self.read_numbers.get(name, 0) + value.numel()
        return value

    def check(self) -> None:
        """See `Weights.check`; and an output layer that config.json ties to the embedding must be the embedding."""
        self.weights.check()
        if TIED[1] in self.dropped() and not torch.equal(*map(self.weights.read, TIED)):
            raise ConfigError(
                f"{self.path}: config.json ties the output layer to the embedding (tie_word_embeddings), and "
                "lm_head.weight holds other numbers; set tie_word_embeddings to false there, or remove lm_head.weight"
            )

    def stored(self) -> dict[str, Any]:
        return self.weights.stored()

    def dropped(self) -> dict[str, str]:
        return self.weights.dropped()

    def rounds_to(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """Whether tensors of those types have fewer digits than they have here; 8-bit blocks are products, which do."""
        blocks = any(word.startswith("F8") for word in self.stored()["stored as"])
        return blocks or any(
            torch.finfo(self.dtype(name)).eps < torch.finfo(dtype).eps for name, dtype in dtypes.items()
        )

    def misread(self, read_numbers: dict[str, int]) -> list[str]:
        """Tensors of which not every number was read exactly once, in words; read_numbers: of all processes."""
        wanted = {name: math.prod(shape) for name, shape in shapes(self.arch).items()}
        return [
            f"{name}: {read_numbers.get(name, 0)} of {count} numbers were read"
            for name, count in wanted.items()
            if read_numbers.get(name, 0) != count
        ]


def open_source(path: Path, scratch: Path, *, config: Path | None = None, allow_pickle: bool = False) -> Source:
    """Recognise and open a checkpoint. Raises ConfigError.

    scratch: a folder for what has to be made of it first; config: a folder whose config.json and tokenizer stand for
    those that the checkpoint lacks; allow_pickle: see `open_weights`.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder, a GGUF file or a Megatron checkpoint")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is a file and not a .gguf; give the folder that it belongs to")
        from grpo_mega.model.formats.gguf import GgufFile

        return Source(path, "gguf", GgufFile(path, scratch))
    found = find_checkpoint(path)
    if found.kind == "huggingface":
        if config is not None:
            raise ConfigError(f"--config={config} is for checkpoints without config.json; {path} has one: leave it out")
        return Source(path, "huggingface", open_found(read_architecture(path), found, allow_pickle))
    home = config or found.home
    if home is None:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "config.json").write_text(json.dumps(config_of(found, allow_pickle)))
        home = scratch
    return Source(path, "megatron", open_found(read_architecture(home), found, allow_pickle))


def known_digests(path: Path) -> dict[str, str]:
    """SHA-256 by tensor, from the report that a conversion left beside its destination; nothing for other folders."""
    report = path / REPORT
    if not report.is_file():
        return {}
    try:
        return dict(json.loads(report.read_text(encoding="utf-8"))["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{report} cannot be read ({error!r}); mend it, or remove it to do without") from None


def check_downloads(path: Path) -> int:
    """Compare files with the digests that a download from a hub has left; how many had one.

    A hub's cache names the files behind its links by their SHA-256; a download into a folder keeps it beside
    (`.cache/huggingface/download/FILE.metadata`, second line). Raises ConfigError for a file that is another.
    """
    count = 0
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        note = path / ".cache" / "huggingface" / "download" / (file.name + ".metadata")
        known = file.resolve().name if file.is_symlink() else ""
        if note.is_file():
            known = [*note.read_text(encoding="utf-8").split(), "", ""][1]
        if not SHA256.fullmatch(known):
            continue
        count += 1
        if (found := _sha256(file)) != known:
            raise ConfigError(
                f"{file} has SHA-256 {found}, its publisher's has {known}: it was damaged or changed; fetch it again"
            )
    return count


def _sha256(file: Path) -> str:  # hashlib.file_digest is not in Python 3.10
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's numbers as they lie in a file."""
    return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def summary(source: Source) -> dict[str, Any]:
    """What the report says about the source."""
    names = shapes(source.arch)
    kinds: dict[str, int] = {}
    for name in names:
        word = str(source.dtype(name)).removeprefix("torch.")
        kinds[word] = kinds.get(word, 0) + 1
    return {
        "path": str(source.path),
        "format": source.kind,
        "architecture": source.arch.raw["architectures"][0],
        "parameters": sum(math.prod(shape) for shape in names.values()),
        "tensors": len(names),
        "dtypes": kinds,
        "stored": source.stored(),
    }
