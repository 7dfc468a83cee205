"""A copy of a model's weights under another layout or dtype, on the same ranks: what a sampler may run on."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.bridge import Piece, Place, pieces
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh


class WeightCopy:
    """`target`'s weights are what `source`'s were at the last `refresh`, cut another way, rounded to its dtype.

    Both tables of pieces name the same Hugging Face tensors, so that what a parameter of one layout shares with one of
    the other is where their pieces overlap. Parameters travel one at a time, within each replica of `source` (through
    the world where experts of a replica lie on others').
    """

    def __init__(
        self,
        arch: Architecture,
        source: tuple[ModelParts, Mesh, tuple[int, ...]],
        target: tuple[ModelParts, Mesh, tuple[int, ...]],
    ):
        """source, target: a model, its mesh, and the layers of each of its stages. Every rank must call."""
        model, self._mesh, layers = source
        self._source = dict(model.named_parameters())
        self._holders = self._mesh.holders
        self._kinds = collectives.gather_objects(
            {name: (p.shape, p.dtype) for name, p in self._source.items()}, self._holders.group
        )
        places = collectives.gather_objects(Place.of(self._mesh, layers), self._holders.group)
        self._tables = [list(pieces(arch, place)) for place in places]  # in the order of the group's ranks
        self.model, mesh, layers = target
        parameters = dict(self.model.named_parameters())
        self._wanted: dict[str, list[tuple[Piece, Tensor]]] = {}
        for name, parts in pieces(arch, Place.of(mesh, layers)):
            parameters[name].data.zero_()  # rows of the padded vocabulary stay 0
            for piece in parts:
                self._wanted.setdefault(piece.name, []).append((piece, parameters[name].data))

    @torch.no_grad()
    def refresh(self) -> ModelParts:
        """Copy the weights as they are now; every rank must call. Returns the copy."""
        holders, seen = self._holders, set()
        for owner, table in enumerate(self._tables):
            for name, parts in table:
                key = (parts[0].name, parts[0].source)
                if key in seen or parts[0].length == 0:
                    continue  # the tied output layer, a norm of another tensor rank; nothing but padding
                seen.add(key)
                if holders.rank == owner:
                    value = self._source[name].detach()
                else:
                    shape, dtype = self._kinds[owner][name]
                    value = torch.empty(shape, dtype=dtype, device=self._mesh.device)
                collectives.broadcast_(value, owner, holders.group)
                for piece in parts:
                    self._take(value, piece)
        return self.model

    def _take(self, value: Tensor, have: Piece) -> None:
        for want, parameter in self._wanted.get(have.name, ()):
            start = max(have.source, want.source)
            length = min(have.source + have.length, want.source + want.length) - start
            if length > 0:
                part = value.narrow(have.dim, have.start + start - have.source, length)
                parameter.narrow(want.dim, want.start + start - want.source, length).copy_(part)
