"""The words that a family's table is written in: which of megatron's tensors holds which of Hugging Face's, and how.

A family is a list of rows. Each row names one of megatron's tensors, as a whole and in any layout, the Hugging Face
tensors in it, and how tensor ranks divide it; sizes are named, and `Architecture.size` knows their numbers. Everything
that moves weights (loading, exporting, converting, copying) reads these rows, in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

EXPERT = "{expert}"  # in both names of a row: one tensor for each expert, divided by expert and expert tensor ranks


@dataclass(frozen=True)
class Piece:
    """mine[start : start + length] along `dim` holds tensor[source : source + length] along the same `dim`."""

    name: str
    dim: int
    source: int
    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """One of megatron's tensors (of a layer, or above the layers); see the functions below for its kinds.

    theirs: Hugging Face's tensors in it, one above the other along dimension 0; sizes: the dimensions of each of them.
    cut: the dimension that tensor ranks divide, each taking a slice of every tensor; None: all have it whole.
    groups: the tensors are query, key and value, one key-value group after the other, and ranks divide all its rows.
    float32: it stays float32 whatever the model's dtype.
    """

    mine: str
    theirs: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]
    cut: int | None = None
    groups: bool = False
    float32: bool = False


def same(mine: str, theirs: str, *sizes: str, float32: bool = False) -> Row:
    """Whole on every tensor rank: norms, routers, what compresses for latent attention."""
    return Row(mine, (theirs,), (sizes,), float32=float32)


def rows(mine: str, theirs: str | tuple[str, ...], *sizes: str) -> Row:
    """Column-parallel, as megatron calls it: ranks divide the output channels, of each of the stacked tensors."""
    stacked = (theirs,) if isinstance(theirs, str) else theirs
    return Row(mine, stacked, (sizes,) * len(stacked), cut=0)


def columns(mine: str, theirs: str, *sizes: str) -> Row:
    """Row-parallel, as megatron calls it: ranks divide the input channels."""
    return Row(mine, (theirs,), (sizes,), cut=1)


def groups(mine: str, theirs: str, *sizes: str) -> Row:
    """Query, key and value (`theirs` with q, k, v for {}) as megatron keeps them: q.. k v | q.. k v | ..., head_dim
    rows a head. With fewer key-value heads than ranks a rank's run of rows cuts through a group."""
    names = tuple(theirs.format(kind) for kind in "qkv")
    return Row(mine, names, (("query", *sizes), ("key", *sizes), ("key", *sizes)), cut=0, groups=True)


def feed_forward(mine: str, gate: str, up: str, down: str, size: str) -> tuple[Row, Row]:
    """A gated feed-forward of `size` channels, by the beginning of megatron's names and Hugging Face's whole ones."""
    return (
        rows(f"{mine}linear_fc1.weight", (gate, up), size, "hidden"),
        columns(f"{mine}linear_fc2.weight", down, "hidden", size),
    )


def projections(theirs: str) -> tuple[str, str, str]:
    """The names that most families give the three."""
    return f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight", f"{theirs}down_proj.weight"


EMBEDDING = rows("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab", "hidden")
FINAL_NORM = same("decoder.final_layernorm.weight", "model.norm.weight", "hidden")
OUTPUT = rows("output_layer.weight", "lm_head.weight", "vocab", "hidden")
SCORE = same("output_layer.weight", "score.weight", "labels", "hidden")
SCORE_BIAS = same("output_layer.bias", "score.bias", "labels")
TIED_OUTPUT = rows("output_layer.weight", "model.embed_tokens.weight", "vocab", "hidden")


@dataclass(frozen=True)
class Family:
    """What sets one family of models apart.

    read: config.json -> fields of Architecture beyond those that all have in common; raises KeyError, ValueError.
    layer: the rows of the decoder layer of that number. drops: names (as regular expressions) of tensors that folders
    of the family carry and that the model does not have, each with the reason. changes: what config.json says instead
    in a folder that we write, of which `drops` are no part. defaults: what `read` and the fields in common find where
    config.json says nothing. text: for folders that hold a language model beside other parts, the config.json that the
    language model alone would have; an export is such a folder. prefixes: how names in such a folder begin, and how
    they begin in the language model's own.
    """

    title: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    layer: Callable[[Architecture, int], tuple[Row, ...]]
    drops: Callable[[Architecture], Mapping[str, str]] = lambda arch: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    prefixes: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)


def dropped(arch: Architecture, name: str) -> str | None:
    """Why a tensor of the folder is left out; None if it is one of the model's, or unknown."""
    drops = {r".*rotary_emb\.inv_freq": "rotary frequencies follow from config.json", **arch.family.drops(arch)}
    if arch.labels:
        drops[r"lm_head\.weight"] = "a reward model has scores in the place of an output layer"
    if arch.tied_embeddings:
        drops[r"lm_head\.weight"] = "the output layer is tied to the embedding"
    return next((reason for pattern, reason in drops.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Whole:
    """One of megatron's tensors in numbers, whole: no rank and no padding in it."""

    name: str  # layers are numbered through the model
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # in the order of `shape`'s rows
    theirs: Mapping[str, tuple[int, ...]]  # the shapes of Hugging Face's tensors in it
    row: Row
    expert: int | None = None  # which expert's

    @property
    def padded(self) -> bool:
        """Whether tensor ranks pad its rows to equal numbers."""
        return self.row.sizes[0][0] == "vocab"


def layer_tensors(arch: Architecture, number: int) -> Iterator[Whole]:
    """megatron's tensors of a decoder layer, in its order; names begin after the layer's number."""
    prefix = f"model.layers.{number}."
    run: list[Row] = []
    for row in (*arch.family.layer(arch, number), None):
        if row is not None and EXPERT in row.mine:
            run.append(row)  # rows of experts that follow each other: expert by expert
            continue
        for expert in range(arch.num_experts if run else 0):
            yield from (_whole(arch, each, prefix, expert) for each in run)
        run = []
        if row is not None:
            yield _whole(arch, row, prefix, None)


def top_tensors(arch: Architecture, *, first: bool, last: bool) -> tuple[list[Whole], list[Whole]]:
    """megatron's tensors before and behind the layers of a stage that is the model's first or last or both."""
    tied = () if first else (TIED_OUTPUT,)
    before = (EMBEDDING,) if first else ()
    head: tuple[Row, ...] = tied if arch.tied_embeddings else (OUTPUT,)
    if arch.labels:
        head = (SCORE, SCORE_BIAS) if arch.score_bias else (SCORE,)
    behind = (FINAL_NORM, *head) if last else ()
    return [_whole(arch, row, "", None) for row in before], [_whole(arch, row, "", None) for row in behind]


def _whole(arch: Architecture, row: Row, prefix: str, expert: int | None) -> Whole:
    names = [prefix + name.replace(EXPERT, str(expert)) for name in row.theirs]
    shapes = [tuple(map(arch.size, sizes)) for sizes in row.sizes]
    pieces: list[Piece] = []
    if row.groups:
        count, start = arch.num_kv_heads, 0
        for group in range(count):
            for name, shape in zip(names, shapes, strict=True):
                length = shape[0] // count
                pieces.append(Piece(name, 0, group * length, start, length))
                start += length
    else:
        dim, start = row.cut or 0, 0
        for name, shape in zip(names, shapes, strict=True):
            pieces.append(Piece(name, dim, 0, start, shape[dim]))
            start += shape[dim]
    length = sum(shape[0] for shape in shapes)
    mine = row.mine.replace(EXPERT, str(expert))
    return Whole(mine, (length, *shapes[0][1:]), tuple(pieces), dict(zip(names, shapes, strict=True)), row, expert)


def cut(whole: Whole, rank: int, size: int, length: int) -> list[Piece]:
    """What rank `rank` of `size` has of a tensor that they divide, `length` long where they do (padding included).

    Beyond a padded vocabulary's end a rank has a piece of length 0.
    """
    if whole.row.cut is None or size == 1:
        return list(whole.pieces)
    blocks = 1 if whole.row.groups else len(whole.row.theirs)
    block = length // blocks
    share = block // size
    result = []
    for n in range(blocks):
        begin = n * block + rank * share
        for piece in whole.pieces:
            low, high = max(begin, piece.start), min(begin + share, piece.start + piece.length)
            if low < high:
                source, start = piece.source + low - piece.start, n * share + low - begin
                result.append(Piece(piece.name, piece.dim, source, start, high - low))
    return result or [Piece(whole.pieces[0].name, 0, whole.shape[0], 0, 0)]
