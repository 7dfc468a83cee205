"""Checkpoints as they lie on disks, each opened as `Weights`: tensors under Hugging Face's names, read by slice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from grpo_mega.model.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Weights(Protocol):
    """An opened checkpoint; nothing is in memory but what is being read."""

    arch: Architecture

    def check(self) -> None:
        """Raise ConfigError for a tensor that is missing, unknown, unreadable or of another shape than `arch` says."""
        ...

    def stored(self) -> dict[str, Any]:
        """How it lies on the disk, for a person: what that means differs by format."""
        ...

    def dropped(self) -> dict[str, str]:
        """Tensors of the checkpoint that the model does not have, each with the reason."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` returns."""
        ...

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """The tensor's entries start .. start + length along `dim` (all of them), on the CPU, as `check`ed."""
        ...


def open_weights(arch: Architecture, allow_pickle: bool = False) -> Weights:
    """Whatever `arch.folder` holds. Raises ConfigError when it holds no weights that are known, or pickles only and
    not `allow_pickle`."""
    from grpo_mega.model.formats.hugging_face import Folder

    return Folder(arch, allow_pickle)
