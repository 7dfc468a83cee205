"""Every tensor of a model under Hugging Face's names, from its family's table."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import Whole, layer_tensors, top_tensors


def all_tensors(arch: Architecture) -> Iterator[Whole]:
    """megatron's tensors of the whole model under its global names (`decoder.layers.7. ...`), in model order."""
    before, behind = top_tensors(arch, first=True, last=True)
    yield from before
    for number in range(arch.num_layers):
        for whole in layer_tensors(arch, number):
            yield Whole(
                f"decoder.layers.{number}.{whole.name}",
                whole.shape, whole.pieces, whole.theirs, whole.row, whole.expert,
            )  # fmt: skip
    yield from behind


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the Hugging Face folder must hold, with its shape, in model order."""
    return {name: shape for whole in all_tensors(arch) for name, shape in whole.theirs.items()}


def float32_names(arch: Architecture) -> set[str]:
    """Those that stay float32 whatever the model's dtype."""
    return {name for whole in all_tensors(arch) if whole.row.float32 for name in whole.theirs}
