"""Writes Megatron's distributed checkpoints (torch_dist) from any `Weights`, chunk by chunk, by one process or several.

What comes out is what Megatron-LM calls a release: DESTINATION/latest_checkpointed_iteration.txt says "release", and
DESTINATION/release holds the model as megatron-core's dist_checkpointing.save would have written it under the layout
asked for: the same keys, chunks and padded vocabulary; any layout can load it. Of torch.distributed.checkpoint only the
records are used: its writer (filesystem.py, torch 2.13) keeps every tensor of a file until the file is complete, and a
checkpoint is to be written by a machine that cannot hold it. Here a chunk is made, written and forgotten.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from grpo_mega.errors import ConfigError
from grpo_mega.model.families.table import Whole
from grpo_mega.model.formats import Weights
from grpo_mega.model.formats.arguments import arguments_of
from grpo_mega.model.formats.boxes import sources
from grpo_mega.model.formats.hugging_face import write_companions
from grpo_mega.model.formats.sharded_names import Part, extra_states, split_name, written_part
from grpo_mega.model.layout import first_layer, layers_per_stage
from grpo_mega.model.names import all_tensors, float32_names, shapes

Tick = Callable[[int, int], None]  # (numbers written so far, of how many)
VERSION = 3.0  # of Megatron-LM's checkpoints: query, key and value of a group follow each other
DIVISIBLE_BY = 128  # Megatron-LM's default of --make-vocab-size-divisible-by


@dataclass(frozen=True)
class Layout:
    """How many ranks divide the model along each axis; expert_tensor: None for as many as `tensor`."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def experts_by(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor


@dataclass
class Written:
    """What one process has written: entries of `.metadata`."""

    chunks: dict[str, list[ChunkStorageMetadata]] = field(default_factory=dict)
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)


def megatron_padding(vocab_size: int, tensor: int) -> int:
    """Rows of the vocabulary as Megatron-LM pads it: the next multiple of 128 x tensor.

    Not `padded_vocab_size`, this trainer's, which is shorter: Megatron-LM takes args.padded_vocab_size for its model's
    size, and whoever does not gets this number from its default. The vocabulary's tensors are the ones for which
    megatron-core lets shapes differ (`allow_shape_mismatch`), so that this trainer's models load them too.
    """
    multiple = DIVISIBLE_BY * tensor
    return -(-vocab_size // multiple) * multiple


class TorchDistWriter:
    """A new checkpoint, written aside and renamed when it is complete.

    The process that `begins` is made before the others; then each calls `write`, and one of them `finish` with what all
    have returned, and `publish`. Raises OSError, as do all methods; ConfigError for what cannot be said.
    """

    def __init__(
        self,
        weights: Weights,
        destination: Path,
        layout: Layout,
        dtypes: Mapping[str, torch.dtype],
        *,
        transformer_engine_names: bool = True,
        begins: bool = True,
    ):
        """dtypes: of each tensor under its Hugging Face name. `unsaid` then holds what Megatron-LM's arguments do not
        say of the model (config.json beside them does). transformer_engine_names: norms as parts of the linears
        behind them (Megatron-LM's with Transformer Engine, and but for mixtures without), not under names of their own
        (this trainer's layer spec)."""
        self.weights, self.arch, self.layout, self.dtypes = weights, weights.arch, layout, dtypes
        self.destination, self.fused = destination, transformer_engine_names
        self.partial = destination.with_name(destination.name + ".partial")
        self.rows = megatron_padding(self.arch.vocab_size, layout.tensor)
        self._layers = layers_per_stage(self.arch, layout.pipeline)
        self._tensors = list(all_tensors(self.arch))
        first, *_ = [self._dtype(whole) for whole in self._tensors]
        self.dtype = first  # the embedding's stands for the model's
        self.arguments, self.unsaid = arguments_of(self.arch, self.dtype, self._layout_arguments())
        if begins:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.folder.mkdir(parents=True)

    @property
    def folder(self) -> Path:
        return self.partial / "release"

    @property
    def nbytes(self) -> int:
        """About how much it takes: the padding of the vocabulary is not in it."""
        return sum(torch.Size(shape).numel() * self.dtypes[name].itemsize for name, shape in shapes(self.arch).items())

    def _dtype(self, whole: Whole) -> torch.dtype:
        found = {self.dtypes[name] for name in whole.theirs}
        if len(found) > 1:
            words = ", ".join(f"{name}: {self.dtypes[name]}" for name in whole.theirs)
            raise ConfigError(
                f"Megatron keeps {' and '.join(whole.theirs)} in one tensor, and they are of several types ({words}); "
                "give all of them one (--dtype)"
            )
        return found.pop()

    def write(self, rank: int = 0, size: int = 1, tick: Tick = lambda done, total: None) -> Written:
        """Of `size` processes, the share of number `rank`: every size-th tensor, all its chunks, each in the file of
        the rank of the layout that would have written it (and of this process)."""
        written = Written()
        done, total = 0, sum(torch.Size(whole.shape).numel() for whole in self._tensors[rank::size])
        with ExitStack() as files:
            streams: dict[str, BinaryIO] = {}
            for whole in self._tensors[rank::size]:
                place = written_part(self.arch, whole, fused=self.fused)
                for owner, start, count in self._cuts(whole):
                    name = f"__{owner}_{rank}.distcp"
                    if name not in streams:
                        streams[name] = files.enter_context((self.folder / name).open("wb"))
                    chunk = self._chunk(whole, place, start, count)
                    self._put(written, streams[name], name, place, start, chunk, whole)
                done += torch.Size(whole.shape).numel()
                tick(done, total)
            for stream in streams.values():
                stream.flush()
        return written

    def _cuts(self, whole: Whole) -> Iterator[tuple[int, int, int]]:
        """(the writing rank's number, first along the dimension that ranks divide, how many) of a tensor's chunks.

        What ranks cut is cut for each of the tensors that are stacked in it: gate and up projection become 2 x ranks.
        """
        dim, size = whole.row.cut, self.layout.tensor if whole.expert is None else self.layout.experts_by
        first = self._stage(whole) * max(self.layout.tensor, self.layout.expert * self.layout.experts_by)
        if whole.expert is not None:
            first += whole.expert * self.layout.expert // self.arch.num_experts * size
        length = self.rows if whole.padded else whole.shape[dim or 0]
        if dim is None:
            yield first, 0, length
            return
        stacked = 1 if whole.row.groups else len(whole.row.theirs)
        share = length // stacked // size
        for n in range(stacked):
            for rank in range(size):
                yield first + rank, n * (length // stacked) + rank * share, share

    def _stage(self, whole: Whole) -> int:
        """The pipeline rank that holds it."""
        layer, name = split_name(whole)
        if layer is None:
            return 0 if name.startswith("embedding.") else self.layout.pipeline - 1
        return next(n for n in reversed(range(len(self._layers))) if first_layer(self._layers, n) <= layer)

    def _chunk(self, whole: Whole, place: Part, start: int, count: int) -> Tensor:
        """The numbers of one chunk, with an axis of length 1 for the layer and the expert; 0 in padded rows."""
        dim = whole.row.cut or 0
        shape = [count if axis == dim else size for axis, size in enumerate(whole.shape)]
        box = tuple((start, start + count) if axis == dim else (0, size) for axis, size in enumerate(shape))
        result = torch.zeros([1] * len(place.index) + shape, dtype=self._dtype(whole))
        inner = result.view(shape)
        for piece, first, at, length in sources(whole, box):
            inner.narrow(piece.dim, at, length).copy_(self.weights.read(piece.name, piece.dim, first, length))
        return result

    def _put(
        self, written: Written, stream: BinaryIO, file: str, place: Part, start: int, chunk: Tensor, whole: Whole
    ) -> None:
        offsets = [*place.index, *([0] * len(whole.shape))]
        offsets[len(place.index) + (whole.row.cut or 0)] = start
        begin = stream.tell()
        torch.save(chunk, stream)
        record = ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk.shape))
        written.chunks.setdefault(place.key, []).append(record)
        index = MetadataIndex(place.key, offsets)
        written.storage[index] = _StorageInfo(file, begin, stream.tell() - begin)

    def finish(self, written: list[Written]) -> None:
        """Add what makes the files a checkpoint. written: of all processes, in any order."""
        metadata = Metadata(state_dict_metadata={}, storage_data={}, version="1.0.0")
        for each in written:
            metadata.storage_data |= each.storage
        objects: dict[str, None] = {}
        for whole in self._tensors:
            place = written_part(self.arch, whole, fused=self.fused)
            objects |= dict.fromkeys(extra_states(self.arch, place, fused=self.fused))
            if place.key in metadata.state_dict_metadata:
                continue
            chunks = sorted(
                (chunk for each in written for chunk in each.chunks.get(place.key, ())), key=lambda c: tuple(c.offsets)
            )
            rows = self.rows if whole.padded else whole.shape[0]
            size = torch.Size((*place.axes, rows, *whole.shape[1:]))
            if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
                raise AssertionError(f"{place.key} is not complete")
            properties = TensorProperties(dtype=self._dtype(whole))
            metadata.state_dict_metadata[place.key] = TensorStorageMetadata(properties, size, chunks)
        self._objects(metadata, list(objects))
        (self.folder / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                        "common_backend": "torch", "common_backend_version": 1})
        )  # fmt: skip
        common = {"args": self.arguments, "checkpoint_version": VERSION, "iteration": 0}
        torch.save(common, self.folder / "common.pt")
        with (self.folder / ".metadata").open("wb") as out:
            pickle.dump(metadata, out)
        write_companions(self.arch, self.partial, str(self.dtype).removeprefix("torch."))
        (self.partial / "latest_checkpointed_iteration.txt").write_text("release")

    def _objects(self, metadata: Metadata, keys: list[str]) -> None:
        """The empty object that a layer without FP8 has beside its weights: one for all of them."""
        content = io.BytesIO()
        torch.save([None], content)
        name = "__0_objects.distcp"
        (self.folder / name).write_bytes(content.getvalue())
        info = _StorageInfo(name, 0, len(content.getvalue()))
        for key in keys:
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key)] = info

    def _layout_arguments(self) -> dict[str, object]:
        """The layout in Megatron-LM's words."""
        layout, mixture = self.layout, bool(self.arch.num_experts)
        return {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "virtual_pipeline_model_parallel_size": None,
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.experts_by,
            "padded_vocab_size": self.rows,
            "make_vocab_size_divisible_by": DIVISIBLE_BY,
            "transformer_impl": "transformer_engine" if self.fused else "local",
            "moe_grouped_gemm": mixture and self.fused,
            "ckpt_format": "torch_dist",
        }

    def publish(self) -> None:
        """Give the finished folder its name."""
        shutil.rmtree(self.destination, ignore_errors=True)
        self.partial.rename(self.destination)


def write_torch_dist(
    weights: Weights,
    destination: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    transformer_engine_names: bool = True,
    tick: Tick = lambda done, total: None,
) -> TorchDistWriter:
    """Begin, write, finish and publish in this process. dtype: of every tensor but those that stay float32
    (None: as each is stored)."""
    kept = float32_names(weights.arch)
    dtypes = {name: weights.dtype(name) if dtype is None or name in kept else dtype for name in shapes(weights.arch)}
    writer = TorchDistWriter(weights, destination, layout, dtypes, transformer_engine_names=transformer_engine_names)
    writer.finish([writer.write(tick=tick)])
    writer.publish()
    return writer
