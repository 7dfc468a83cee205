"""What a folder is: which format its weights have, and where in it they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo_mega.errors import ConfigError

Kind = Literal["huggingface", "torch_dist", "legacy"]
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's: an iteration's number, or "release"
HUGGING_FACE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Found:
    """A checkpoint: folder: where its tensors are; home: where its config.json is (None: nowhere near)."""

    kind: Kind
    folder: Path
    home: Path | None

    @property
    def title(self) -> str:
        return {
            "huggingface": "a Hugging Face folder",
            "torch_dist": "a distributed checkpoint of Megatron's",
            "legacy": "a checkpoint of Megatron-LM's in its old format",
        }[self.kind]


def find_checkpoint(path: Path) -> Found:
    """The checkpoint that a folder is, or that it says is its latest: a Hugging Face folder; Megatron-LM's root or one
    of the iterations in it; this trainer's run directory, its checkpoints, or one of them. Raises ConfigError."""
    folder = path
    for _ in range(3):  # a run directory's checkpoints' latest
        kind = _kind(folder)
        if kind is not None:
            places = (folder, path, folder.parent)
            home = next((place for place in places if (place / "config.json").is_file()), None)
            return Found(kind, folder, home)
        named = _named(folder)
        if named is None:
            break
        folder = named
    if (folder / "config.json").is_file():  # its reader says best what it lacks
        return Found("huggingface", folder, folder)
    words = (
        f"{path} holds no weights" if folder == path else f"{path} names {folder} its latest, which holds no weights"
    )
    raise ConfigError(
        f"{words}; give a Hugging Face folder, a Megatron-LM checkpoint ({TRACKER}, iter_N or release) or a run's "
        "checkpoints"
    )


def _kind(folder: Path) -> Kind | None:
    if any((folder / name).is_file() for name in HUGGING_FACE):
        return "huggingface"
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return "torch_dist"
    if any(folder.glob("mp_rank_*")):
        return "legacy"
    return None


def _named(folder: Path) -> Path | None:
    """The folder that this one says is to be read; None where it says nothing."""
    tracker, pointer = folder / TRACKER, folder / "latest"
    if tracker.is_file():
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if word != "release" and not word.isdigit():
            raise ConfigError(f"{tracker} says {word[:40]!r}; write release or the number of an iteration in it")
        return folder / ("release" if word == "release" else f"iter_{int(word):07d}")
    if pointer.is_file():
        return folder / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if (folder / "checkpoints" / "latest").is_file():
        return folder / "checkpoints"
    return None
