"""Names and slices: which part of which Hugging Face tensor each megatron parameter of each rank holds.

One table, `pieces`, serves every direction: loading takes the pieces out of a checkpoint's tensors, `gathered` puts
them back together from all ranks, whoever asks (an export, a sampler elsewhere, a conversion). What is in it is the
family's table (`families`) cut at a place of the mesh: a column-parallel weight is cut along its rows (a gate and the
up projection below it each), a row-parallel one along its columns.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_mega.errors import RunDirectoryError
from grpo_mega.model.architecture import Architecture, padded_vocab_size
from grpo_mega.model.families.table import Piece, Whole, cut, layer_tensors, top_tensors
from grpo_mega.model.formats import Weights, open_weights
from grpo_mega.model.formats.hugging_face import Writer
from grpo_mega.model.layout import first_layer
from grpo_mega.model.names import float32_names, shapes
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh

Tick = Callable[[int, int], None]  # (numbers moved so far, of how many)


def silent(done: int, total: int) -> None:
    """Where nobody waits."""


@dataclass(frozen=True)
class Place:
    """A model-parallel coordinate: which tensor rank of which pipeline rank, and which part of a mixture's experts.

    layers: of each of the model's stages; those of pipeline rank p are p, p + pipeline_size, ...
    """

    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    layers: tuple[int, ...]
    expert: int = 0
    expert_size: int = 1
    expert_tensor: int = 0
    expert_tensor_size: int = 1

    @classmethod
    def of(cls, mesh: Mesh, layers: tuple[int, ...]) -> Place:
        t, p, e, s = mesh.tensor, mesh.pipeline, mesh.expert, mesh.expert_tensor
        return cls(t.rank, t.size, p.rank, p.size, layers, e.rank, e.size, s.rank, s.size)

    @property
    def stages(self) -> range:
        return range(self.pipeline, len(self.layers), self.pipeline_size)


def entries(arch: Architecture, place: Place) -> Iterator[tuple[str, Whole, list[Piece]]]:
    """(parameter name in `ModelParts`, the tensor that it is a slice of, its pieces) for every parameter of one place,
    stage by stage."""
    for part, stage in enumerate(place.stages):
        before, behind = top_tensors(arch, first=stage == 0, last=stage == len(place.layers) - 1)
        for whole in before:
            yield f"{part}.{whole.name}", whole, _cut(arch, place, whole)
        first = first_layer(place.layers, stage)
        for local in range(place.layers[stage]):
            for whole in layer_tensors(arch, first + local):
                name = _expert_name(arch, place, whole)
                if name is not None:
                    yield f"{part}.decoder.layers.{local}.{name}", whole, _cut(arch, place, whole)
        for whole in behind:
            yield f"{part}.{whole.name}", whole, _cut(arch, place, whole)


def pieces(arch: Architecture, place: Place) -> Iterator[tuple[str, list[Piece]]]:
    """(parameter name in `ModelParts`, its pieces) for every parameter of one place, stage by stage."""
    for name, _, parts in entries(arch, place):
        yield name, parts


def _expert_name(arch: Architecture, place: Place, whole: Whole) -> str | None:
    """The tensor's name where experts are numbered from the first of this place; None for another place's expert."""
    if whole.expert is None:
        return whole.name
    local = arch.num_experts // place.expert_size
    number = whole.expert - place.expert * local
    return whole.name.replace(f".{whole.expert}.", f".{number}.", 1) if 0 <= number < local else None


def _cut(arch: Architecture, place: Place, whole: Whole) -> list[Piece]:
    rank, size = place.tensor, place.tensor_size
    if whole.expert is not None:
        rank, size = place.expert_tensor, place.expert_tensor_size
    length = whole.shape[whole.row.cut or 0]
    return cut(whole, rank, size, padded_vocab_size(arch.vocab_size, size) if whole.padded else length)


def local_shape(arch: Architecture, place: Place, whole: Whole) -> tuple[int, ...]:
    """The shape of this place's slice of the tensor, with padding."""
    shape, dim = list(whole.shape), whole.row.cut
    if dim is not None:
        size = place.tensor_size if whole.expert is None else place.expert_tensor_size
        length = padded_vocab_size(arch.vocab_size, size) if whole.padded else shape[dim]
        shape[dim] = length // size
    return tuple(shape)


@torch.no_grad()
def load(
    model: nn.Module, arch: Architecture, place: Place, tick: Tick = silent, weights: Weights | None = None
) -> None:
    """Fill this rank's parameters from `weights` (default: of `arch.folder`), reading only their slices; padded
    vocabulary rows become 0."""
    done, total = 0, sum(parameter.numel() for parameter in model.parameters())
    for parameter, value in tensors(model, arch, place, weights=weights):
        parameter.copy_(value)
        done += parameter.numel()
        tick(done, total)


def tensors(
    model: nn.Module,
    arch: Architecture,
    place: Place,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each of this rank's parameters with what `weights` (default: of `arch.folder`) have for it, in the parameter's
    dtype or in `dtype`."""
    weights = weights or open_weights(arch)
    weights.check()
    parameters = dict(model.named_parameters())
    for name, parts in pieces(arch, place):
        parameter = parameters.pop(name)
        whole = torch.zeros(parameter.shape, dtype=dtype or parameter.dtype)
        for piece in parts:
            if piece.length:  # a tensor rank beyond the real vocabulary has none; safetensors refuses the empty slice
                value = weights.read(piece.name, piece.dim, piece.source, piece.length)
                whole.narrow(piece.dim, piece.start, piece.length).copy_(value)
        yield parameter, whole
    if parameters:
        raise AssertionError(f"parameters without a source: {sorted(parameters)}")


def places(mesh: Mesh, layers: tuple[int, ...]) -> dict[int, Place]:
    """Every place of the model with the first rank of the world that is there. Every rank must call."""
    found: dict[int, Place] = {}
    for rank, place in enumerate(collectives.gather_objects(Place.of(mesh, layers), mesh.world.group)):
        if place not in found.values():
            found[rank] = place
    return found


@torch.no_grad()
def gathered(
    model: nn.Module, arch: Architecture, mesh: Mesh, layers: tuple[int, ...]
) -> Iterator[tuple[str, Tensor | None]]:
    """(Hugging Face name, whole tensor on the CPU) of the model, each once; the tensor on the world's first rank, None
    on the others. Every rank must go through all of them.

    Slices travel one at a time, each from the first rank that holds it, and what is in memory at once is one of
    megatron's parameters whole (query, key and value of a layer, say). Raises AssertionError, on the first rank, when
    a tensor remains incomplete.
    """
    parameters = dict(model.named_parameters())
    owners, known = places(mesh, layers), shapes(arch)
    missing = {name: math.prod(shape) for name, shape in known.items()}
    sent: set[Piece] = set()
    parts_of: dict[str, Tensor] = {}
    for pipeline in range(mesh.pipeline.size):
        stage = {rank: pieces(arch, place) for rank, place in owners.items() if place.pipeline == pipeline}
        for several in zip(*stage.values(), strict=True):  # the slices of one tensor, one after the other
            for rank, (name, parts) in zip(stage, several, strict=True):
                new = [piece for piece in parts if piece.length and piece not in sent]
                if not new:
                    continue  # a norm of another tensor rank, what only the experts' grid has several places for
                sent.update(new)
                mine = parameters[name] if mesh.rank == rank else None
                value = collectives.send_to_first(mine, rank, mesh.world.group)
                for piece in new:
                    shape = known[piece.name]
                    missing[piece.name] -= math.prod(shape) // shape[piece.dim] * piece.length
                    if value is not None:
                        whole = parts_of.setdefault(piece.name, torch.empty(shape, dtype=value.dtype))
                        part = value.narrow(piece.dim, piece.start, piece.length)
                        whole.narrow(piece.dim, piece.source, piece.length).copy_(part)
                    if missing[piece.name] == 0:
                        yield piece.name, parts_of.pop(piece.name, None)
    incomplete = [name for name, count in missing.items() if count]
    if incomplete:
        raise AssertionError(f"{len(incomplete)} tensors incomplete, the first is {incomplete[0]}")


def export(
    model: nn.Module,
    arch: Architecture,
    mesh: Mesh,
    layers: tuple[int, ...],
    destination: Path,
    tick: Tick = silent,
) -> None:
    """Write the model as a Hugging Face folder that `transformers` loads. Every rank must call.

    The folder appears under its name only when it is complete. Raises RunDirectoryError, on the writer and once it has
    heard the other ranks out, when it cannot be written.
    """
    dtype, kept = next(model.parameters()).dtype, float32_names(arch)
    dtypes = {name: torch.float32 if name in kept else dtype for name in shapes(arch)}
    total, done = sum(map(math.prod, shapes(arch).values())), 0
    failure: OSError | None = None

    def guard(action: Callable[..., Any], *args: Any) -> Any:
        """Do it on the writer unless something has failed; who sends is heard out all the same."""
        nonlocal failure
        if failure is None and mesh.is_writer:
            try:
                return action(*args)
            except OSError as error:
                failure = error
        return None

    writer: Writer | None = guard(Writer, arch, destination, dtypes)
    for name, value in gathered(model, arch, mesh, layers):
        if value is not None:
            guard(Writer.put, writer, name, value)
            done += value.numel()
            tick(done, total)
    guard(Writer.close, writer)
    if failure is not None:
        shutil.rmtree(destination.with_name(destination.name + ".partial"), ignore_errors=True)
        raise RunDirectoryError(f"{destination} cannot be written ({failure})") from failure
