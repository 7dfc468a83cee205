"""Megatron's distributed checkpoints (torch_dist), of Megatron-LM, of megatron-core and of this trainer, as `Weights`.

Such a checkpoint is a folder: `.metadata` says of every tensor its global shape and its chunks, and of every chunk the
file, the offset and the length; the files, *.distcp, hold chunks one behind the other, each as torch.save wrote it.
Which layout wrote it shows in the chunks alone, so that any layout's is read alike. In memory are what is asked for
and one chunk.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import Whole
from grpo_mega.model.formats.boxes import Box, box_of, holders, moved, overlap, part, piece_box, requested
from grpo_mega.model.formats.hugging_face import FLOATS
from grpo_mega.model.formats.pickles import Window, read_records, read_saved
from grpo_mega.model.formats.sharded_names import EXTRA_STATE, Part, found_parts
from grpo_mega.model.names import all_tensors, shapes

# what a training checkpoint holds besides the model: optimizers, random states, the state of a run
_NOT_THE_MODEL = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state|common_state|opt_param_scheduler)[./_]?.*")
_DROPPED = {
    re.compile(rf".*\.{EXTRA_STATE}"): "what a layer remembers of FP8; its weights are whole without",
    re.compile(r"(.*\.)?rotary_pos_emb\.inv_freq"): "rotary frequencies follow from config.json",
    re.compile(r"mtp\..*"): "layers that predict several tokens at once, which the model does not have",
}


class MegatronCheckpoint:
    """The model's tensors of a distributed checkpoint."""

    def __init__(self, arch: Architecture, folder: Path):
        """folder: the one with `.metadata` in it. Raises ConfigError."""
        self.arch, self.path = arch, folder
        self.metadata = read_metadata(folder)
        self._tensors = {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._holders = holders(arch)
        self._shapes = shapes(arch)
        self._parts = {whole.name: found_parts(arch, whole, self._tensors) for whole in all_tensors(arch)}
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}  # see `_chunks_at`
        self._last: tuple[MetadataIndex, Tensor] | None = None  # query, key and value lie in one chunk

    def check(self) -> None:
        used: set[str] = set()
        for whole in all_tensors(self.arch):
            used |= self._check_tensor(whole)
        unknown = [key for key in self._tensors if key not in used and not _reason(key)]
        unknown = [key for key in unknown if not _NOT_THE_MODEL.fullmatch(key)]
        if unknown:
            raise ConfigError(
                f"{self.path} holds {len(unknown)} tensors that config.json does not account for, the first is "
                f"{min(unknown)}; is config.json the one that belongs to these weights?"
            )
        for key in used:
            self._check_chunks(key)

    def _check_tensor(self, whole: Whole) -> set[str]:
        """The keys that hold it."""
        parts = self._parts[whole.name]
        if not parts:
            raise ConfigError(
                f"{self.path} lacks {whole.name}, which is {' and '.join(whole.theirs)} in config.json's model; is "
                "config.json the one that belongs to these weights?"
            )
        for each in parts:
            found = tuple(self._tensors[each.key].size)
            wanted = (*each.axes, each.rows, *whole.shape[1:])
            longer = whole.padded and found[0] >= wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not longer:
                raise ConfigError(
                    f"{self.path}: {each.key} has shape {found}, config.json says {wanted}"
                    f"{', or more rows' if whole.padded else ''}; is it the one that belongs to these weights?"
                )
            dtype = self._tensors[each.key].properties.dtype
            if dtype not in FLOATS:
                raise ConfigError(
                    f"{self.path}: {each.key} is of type {dtype}; supported: {', '.join(map(str, FLOATS))}: save the "
                    "model from Megatron in one of them"
                )
        return {each.key for each in parts}

    def _check_chunks(self, key: str) -> None:
        """Its chunks cover the tensor, and lie in files that are there and long enough."""
        entry = self._tensors[key]
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.size):
            raise ConfigError(
                f"{self.path}/.metadata: the chunks of {key} hold {covered} numbers, its shape {tuple(entry.size)} has "
                f"{math.prod(entry.size)}; copy the checkpoint again, whole"
            )
        for chunk in entry.chunks:
            self._place(MetadataIndex(key, chunk.offsets))

    def _place(self, index: MetadataIndex) -> tuple[Path, int, int]:
        """(file, offset, length) of a chunk or an object."""
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise ConfigError(f"{self.path}/.metadata does not say where {index.fqn} lies; copy the checkpoint again")
        if getattr(info, "transform_descriptors", None):
            raise ConfigError(
                f"{self.path}: {index.fqn} is stored by {', '.join(info.transform_descriptors)}; save the checkpoint "
                "without extensions"
            )
        file = self.path / info.relative_path
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < info.offset + info.length:
            found = "is not there" if size is None else f"has {size} bytes"
            raise ConfigError(
                f"{file} {found}, and .metadata says that {index.fqn} lies in it from byte {info.offset} to "
                f"{info.offset + info.length}; copy the checkpoint again, whole"
            )
        return file, info.offset, info.length

    def stored(self) -> dict[str, Any]:
        """See `Weights.stored`."""
        keys = {each.key for parts in self._parts.values() for each in parts}
        kinds = Counter(str(self._tensors[key].properties.dtype).removeprefix("torch.") for key in keys)
        files = {info.relative_path for info in self.metadata.storage_data.values()}
        chunks = sum(len(self._tensors[key].chunks) for key in keys)
        others = len(self.metadata.state_dict_metadata) - len(keys)
        return {"distcp files": len(files), "stored as": dict(kinds), "chunks": chunks, "entries of a run": others}

    def dropped(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for key in self.metadata.state_dict_metadata:
            name = key.partition("/shard_")[0]
            if (reason := _reason(name)) and not _NOT_THE_MODEL.fullmatch(name):
                found[name] = reason
        return found

    def dtype(self, name: str) -> torch.dtype:
        whole, _ = self._holders[name][0]
        return self._tensors[self._parts[whole.name][0].key].properties.dtype

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        box = requested(self._shapes[name], dim, start, length)
        origin = [low for low, _ in box]
        result = torch.empty([high - low for low, high in box], dtype=self.dtype(name))
        for whole, piece in self._holders[name]:
            shared = overlap(box, piece_box(piece, self._shapes[name]))
            if shared is None:
                continue
            to_whole = piece.start - piece.source
            for each in self._parts[whole.name]:
                self._copy(each, result, origin, moved(shared, piece.dim, to_whole), (piece.dim, to_whole))
        return result

    def _copy(self, each: Part, result: Tensor, origin: list[int], box: Box, shift: tuple[int, int]) -> None:
        """Fill what a box of megatron's tensor shares with one part of it. shift: by how much, along which dimension,
        the box's coordinates are beyond those of the result, whose first entry is at `origin`."""
        dim, by = shift
        leading = len(each.index)
        for chunk in self._chunks_at(each):
            whole_chunk = box_of(chunk.offsets, chunk.sizes)
            mine = moved(whole_chunk[leading:], 0, each.start)
            shared = overlap(box, mine)
            if shared is None:
                continue
            values = self._chunk(MetadataIndex(each.key, chunk.offsets), tuple(chunk.sizes))
            values = values[tuple(n - low for n, (low, _) in zip(each.index, whole_chunk, strict=False))]
            target = part(result, moved(shared, dim, -by), origin)
            target.copy_(part(values, shared, [low for low, _ in mine]))

    def _chunks_at(self, each: Part) -> list[ChunkStorageMetadata]:
        """The chunks that meet a part: found once for each tensor, of which one may hold all experts of all layers."""
        known = self._chunks.get(each.key)
        if known is None:
            known = self._chunks[each.key] = {}
            for chunk in self._tensors[each.key].chunks:
                ranges = [range(low, high) for low, high in box_of(chunk.offsets, chunk.sizes)[: len(each.index)]]
                for index in product(*ranges):
                    known.setdefault(index, []).append(chunk)
        return known.get(each.index, [])

    def _chunk(self, index: MetadataIndex, sizes: tuple[int, ...]) -> Tensor:
        if self._last is None or self._last[0] != index:
            self._last = None  # first, so that two are never held
            file, offset, length = self._place(index)
            with closing(Window(file, offset, length)) as window:
                value = read_saved(window, Path(f"{file} (bytes {offset} to {offset + length})"))
            if not isinstance(value, Tensor) or tuple(value.shape) != sizes:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(
                    f"{file}: where {index.fqn} should lie, {sizes}, is {found}; copy the checkpoint again, whole"
                )
            self._last = index, value
        return self._last[1]


def _reason(key: str) -> str | None:
    """Why an entry is left out; None for one that is not."""
    name = key.partition("/shard_")[0]
    return next((reason for pattern, reason in _DROPPED.items() if pattern.fullmatch(name)), None)


def read_metadata(folder: Path) -> Metadata:
    """A distributed checkpoint's table of contents. Raises ConfigError for a folder that has none that can be read."""
    kind = folder / "metadata.json"
    try:
        backend = json.loads(kind.read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{kind} cannot be read ({error}); copy the checkpoint again, whole") from None
    if backend != "torch_dist":
        raise ConfigError(f"{kind} says sharded_backend={backend!r}; save the checkpoint as torch_dist (--ckpt-format)")
    metadata = read_records(folder / ".metadata")
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ConfigError(f"{folder}/.metadata is no checkpoint's description; copy the checkpoint again, whole")
    return metadata


def read_settings(folder: Path) -> dict[str, Any]:
    """What the checkpoint holds beside tensors (`args`, `iteration`, ...): common.pt, or the object that megatron-core
    0.19 has in its place. Raises ConfigError."""
    common = folder / "common.pt"
    if common.is_file():
        return cast("dict[str, Any]", read_saved(common, common))
    place = read_metadata(folder).storage_data.get(MetadataIndex("common_state/shard_0_1"))
    if place is None:
        return {}
    file = folder / place.relative_path
    try:
        with closing(Window(file, place.offset, place.length)) as window:
            return cast("dict[str, Any]", read_saved(window, file)[0])
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; copy the checkpoint again, whole") from None
