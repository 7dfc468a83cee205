"""Boxes: a range along each dimension of a tensor, and which parts of megatron's tensors hold a box of a Hugging Face
tensor. What reads Megatron's checkpoints meets chunks of any size, and copies what a box shares with each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import Piece, Whole
from grpo_mega.model.names import all_tensors

Box = tuple[tuple[int, int], ...]  # (first, behind the last) along each dimension


def box_of(offsets: Iterable[int], sizes: Iterable[int]) -> Box:
    return tuple((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def overlap(a: Box, b: Box) -> Box | None:
    """What both have; None for nothing."""
    shared = tuple((max(low, other), min(high, end)) for (low, high), (other, end) in zip(a, b, strict=True))
    return shared if all(low < high for low, high in shared) else None


def moved(box: Box, dim: int, by: int) -> Box:
    return tuple((low + by, high + by) if axis == dim else (low, high) for axis, (low, high) in enumerate(box))


def part(tensor: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """The view of `box` in a tensor whose first entry has the coordinates `origin`."""
    for axis, (low, high) in enumerate(box):
        tensor = tensor.narrow(axis, low - origin[axis], high - low)
    return tensor


def requested(shape: Sequence[int], dim: int, start: int, length: int | None) -> Box:
    """`Weights.read`'s words as a box."""
    stop = shape[dim] if length is None else start + length
    if not 0 <= start <= stop <= shape[dim]:
        raise AssertionError(f"{start} to {stop} along dimension {dim} is not in {tuple(shape)}")
    return tuple((start, stop) if axis == dim else (0, size) for axis, size in enumerate(shape))


def holders(arch: Architecture) -> dict[str, list[tuple[Whole, Piece]]]:
    """Of each Hugging Face tensor, which pieces of which of megatron's tensors it consists of."""
    found: dict[str, list[tuple[Whole, Piece]]] = {}
    for whole in all_tensors(arch):
        for piece in whole.pieces:
            found.setdefault(piece.name, []).append((whole, piece))
    return found


def sources(whole: Whole, box: Box) -> Iterator[tuple[Piece, int, int, int]]:
    """What fills a box of a whole tensor of megatron's: (piece, first of the Hugging Face tensor along the piece's
    dimension, first within the box, how many). The box spans every other dimension; padding has no source."""
    for piece in whole.pieces:
        low, high = box[piece.dim]
        first, last = max(low, piece.start), min(high, piece.start + piece.length)
        if first < last:
            yield piece, piece.source + first - piece.start, first - low, last - first


def piece_box(piece: Piece, shape: Sequence[int]) -> Box:
    """Where a piece lies in its Hugging Face tensor of that shape."""
    ends = (piece.source, piece.source + piece.length)
    return tuple(ends if axis == piece.dim else (0, size) for axis, size in enumerate(shape))
