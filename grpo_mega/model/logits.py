"""Whole logits of a few short sequences, gathered onto one rank, for comparisons: nothing else makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_mega.model.attention import PackedRows
from grpo_mega.model.decode import Decoder
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh


@torch.no_grad()
def logits_of(model: ModelParts, vocab_size: int, mesh: Mesh, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, vocab_size] of each sequence, one at a time, on the CPU of the world's first rank; empty elsewhere.

    Every rank must call. The model's own dtype, before any temperature.
    """
    decoder = Decoder(model.eval(), vocab_size, mesh, temperature=1.0)
    sender = max(rank for rank, place in enumerate(_coordinates(mesh)) if place == (0, True, 0))
    found = []
    for tokens in sequences:
        count = len(tokens)
        positions = torch.arange(count, device=mesh.device)
        with mesh.active():
            hidden = decoder.forward(
                torch.tensor(tokens, device=mesh.device),
                positions,
                lambda cos, sin, count=count: PackedRows(cos, sin, (count,)),
            )
        decoder.link.flush()
        mine = None
        if hidden is not None:
            slices = collectives.gather((hidden[:count] @ model.output_weight().t()).contiguous(), mesh.tensor.group)
            mine = torch.cat(tuple(slices), dim=1)[:, :vocab_size]
        arrived = collectives.send_to_first(mine if mesh.rank == sender else None, sender, mesh.world.group)
        if arrived is not None:
            found.append(arrived.cpu())
    return found


def _coordinates(mesh: Mesh) -> list[tuple[int, bool, int]]:
    return collectives.gather_objects((mesh.tensor.rank, mesh.pipeline.last, mesh.data.rank), mesh.world.group)
