"""Checkpoints as they lie on disks, each opened as `Weights`: tensors under Hugging Face's names, read by slice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from grpo_mega.model.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grpo_mega.model.formats.find import Found


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
    """Whatever `arch.folder` holds, or says is the latest that it holds. Raises ConfigError when it holds no weights
    that are known, or pickles only and not `allow_pickle`."""
    from grpo_mega.model.formats.find import find_checkpoint

    return open_found(arch, find_checkpoint(arch.folder), allow_pickle)


def open_found(arch: Architecture, found: Found, allow_pickle: bool = False) -> Weights:
    """The weights of a checkpoint that `find_checkpoint` has found, as those of `arch`."""
    if found.kind == "torch_dist":
        from grpo_mega.model.formats.torch_dist import MegatronCheckpoint

        return MegatronCheckpoint(arch, found.folder)
    if found.kind == "legacy":
        from grpo_mega.model.formats.legacy import LegacyCheckpoint

        return LegacyCheckpoint(arch, found.folder, allow_pickle)
    from grpo_mega.model.formats.hugging_face import Folder

    return Folder(arch, allow_pickle)


def config_of(found: Found, allow_pickle: bool = False) -> dict[str, Any]:
    """config.json's words for a checkpoint of Megatron-LM's that has none beside it, from the arguments that it holds.

    Raises ConfigError where it holds none, or config.json cannot say what they say.
    """
    from grpo_mega.errors import ConfigError
    from grpo_mega.model.formats.arguments import config_from_arguments

    settings: dict[str, Any] = {}
    if found.kind == "torch_dist":
        from grpo_mega.model.formats.torch_dist import read_settings

        settings = read_settings(found.folder)
    elif found.kind == "legacy":
        from grpo_mega.model.formats.legacy import open_ranks

        settings = open_ranks(found.folder, allow_pickle)[0, 0, 0]
    if settings.get("args") is None:
        raise ConfigError(
            f"{found.folder} holds no arguments of Megatron-LM's that say which model it is; put the model's "
            "config.json beside it"
        )
    return config_from_arguments(settings["args"])
