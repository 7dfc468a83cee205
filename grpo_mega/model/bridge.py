"""Names and slices: which part of which Hugging Face tensor each megatron parameter of each rank holds.

One table, `pieces`, serves both directions: reading takes the pieces out of the folder's tensors, writing puts them
back and refuses to finish while a tensor is incomplete. Llama's or Mixtral's naming on one side, megatron's local spec
on the other.

Megatron keeps query, key and value of one key-value group together: rows q.. k v | q.. k v | ..., head_dim rows a head;
`linear_fc1` is the gate's slice above the up projection's; a row-parallel weight is cut along its columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo_mega.errors import ConfigError, RunDirectoryError
from grpo_mega.model.architecture import Architecture, padded_vocab_size
from grpo_mega.model.layout import first_layer
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh

SHARD_BYTES = 4 << 30
Tick = Callable[[int, int], None]  # (numbers moved so far, of how many)
IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old folders carry; it follows from config.json


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


@dataclass(frozen=True)
class Piece:
    """local[start : start + length] along `dim` holds tensor[source : source + length] along the same `dim`."""

    name: str
    dim: int
    source: int
    start: int
    length: int


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the Hugging Face folder must hold, with its shape."""
    h, d = arch.hidden_size, arch.head_dim
    result = {"model.embed_tokens.weight": (arch.vocab_size, h), "model.norm.weight": (h,)}
    if not arch.tied_embeddings:
        result["lm_head.weight"] = (arch.vocab_size, h)
    for n in range(arch.num_layers):
        layer = f"model.layers.{n}."
        result |= {
            layer + "input_layernorm.weight": (h,),
            layer + "self_attn.q_proj.weight": (arch.num_heads * d, h),
            layer + "self_attn.k_proj.weight": (arch.num_kv_heads * d, h),
            layer + "self_attn.v_proj.weight": (arch.num_kv_heads * d, h),
            layer + "self_attn.o_proj.weight": (h, arch.num_heads * d),
            layer + "post_attention_layernorm.weight": (h,),
        }
        if arch.num_experts:
            result[layer + "block_sparse_moe.gate.weight"] = (arch.num_experts, h)
        size = arch.expert_ffn_size or arch.ffn_size
        for gate, up, down in _feed_forwards(arch, layer):
            result |= {gate: (size, h), up: (size, h), down: (h, size)}
    return result


def _feed_forwards(arch: Architecture, layer: str) -> list[tuple[str, str, str]]:
    """Names of a layer's gate, up and down projections: one of each, or one of each for every expert."""
    if not arch.num_experts:
        return [(layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight", layer + "mlp.down_proj.weight")]
    each = (f"{layer}block_sparse_moe.experts.{n}." for n in range(arch.num_experts))
    return [(expert + "w1.weight", expert + "w3.weight", expert + "w2.weight") for expert in each]


def pieces(arch: Architecture, place: Place) -> Iterator[tuple[str, list[Piece]]]:
    """(parameter name in `ModelParts`, its pieces) for every parameter of one place, stage by stage."""
    for part, stage in enumerate(place.stages):
        for name, parts in _stage(arch, place, stage):
            yield f"{part}.{name}", parts


def _stage(arch: Architecture, place: Place, stage: int) -> Iterator[tuple[str, list[Piece]]]:
    """The same of one stage, under megatron's own names, layer by layer."""

    def whole(name: str, length: int = arch.hidden_size) -> Piece:
        return Piece(name, 0, 0, 0, length)

    if stage == 0:
        yield "embedding.word_embeddings.weight", _vocabulary("model.embed_tokens.weight", arch, place)
    first = first_layer(place.layers, stage)
    for local in range(place.layers[stage]):
        mine, theirs = f"decoder.layers.{local}.", f"model.layers.{first + local}."
        yield mine + "input_layernorm.weight", [whole(theirs + "input_layernorm.weight")]
        yield mine + "self_attention.linear_qkv.weight", _query_key_value(theirs + "self_attn.", arch, place)
        columns = arch.num_heads * arch.head_dim // place.tensor_size
        out = Piece(theirs + "self_attn.o_proj.weight", 1, place.tensor * columns, 0, columns)
        yield mine + "self_attention.linear_proj.weight", [out]
        yield mine + "pre_mlp_layernorm.weight", [whole(theirs + "post_attention_layernorm.weight")]
        if arch.num_experts:
            yield mine + "mlp.router.weight", [whole(theirs + "block_sparse_moe.gate.weight", arch.num_experts)]
        yield from _multiplied(arch, place, mine + "mlp.", theirs)
    if stage == len(place.layers) - 1:
        yield "decoder.final_layernorm.weight", [whole("model.norm.weight")]
        if not arch.tied_embeddings:
            yield "output_layer.weight", _vocabulary("lm_head.weight", arch, place)
        elif len(place.layers) > 1:
            yield "output_layer.weight", _vocabulary("model.embed_tokens.weight", arch, place)


def _multiplied(arch: Architecture, place: Place, mine: str, theirs: str) -> Iterator[tuple[str, list[Piece]]]:
    """The matrices of a layer's feed-forward, or of those of its experts that lie here."""
    names, size, rank, cut = _feed_forwards(arch, theirs), arch.ffn_size, place.tensor, place.tensor_size
    prefixes = [mine]
    if arch.num_experts:
        size, rank, cut = arch.expert_ffn_size, place.expert_tensor, place.expert_tensor_size
        local = arch.num_experts // place.expert_size
        names = names[place.expert * local : (place.expert + 1) * local]
        prefixes = [f"{mine}experts.local_experts.{n}." for n in range(local)]
    share = size // cut
    for prefix, (gate, up, down) in zip(prefixes, names, strict=True):
        halves = [Piece(name, 0, rank * share, n * share, share) for n, name in enumerate((gate, up))]
        yield prefix + "linear_fc1.weight", halves
        yield prefix + "linear_fc2.weight", [Piece(down, 1, rank * share, 0, share)]


def _vocabulary(name: str, arch: Architecture, place: Place) -> list[Piece]:
    """Rows of the padded vocabulary that are real; the rest stay zero."""
    rows = padded_vocab_size(arch.vocab_size, place.tensor_size) // place.tensor_size
    source = place.tensor * rows
    return [Piece(name, 0, source, 0, max(0, min(rows, arch.vocab_size - source)))]


def _query_key_value(prefix: str, arch: Architecture, place: Place) -> list[Piece]:
    """This rank's run of the interleaved rows; with fewer key-value heads than ranks it may cut through a group."""
    d, per_group = arch.head_dim, arch.num_heads // arch.num_kv_heads
    total = (arch.num_heads + 2 * arch.num_kv_heads) * d
    begin, end = (place.tensor * total // place.tensor_size, (place.tensor + 1) * total // place.tensor_size)
    result, row = [], 0
    for group in range(arch.num_kv_heads):
        for name, source, length in (
            ("q_proj", group * per_group * d, per_group * d),
            ("k_proj", group * d, d),
            ("v_proj", group * d, d),
        ):
            low, high = max(begin, row), min(end, row + length)
            if low < high:
                result.append(Piece(f"{prefix}{name}.weight", 0, source + low - row, low - begin, high - low))
            row += length
    return result


class Folder:
    """The safetensors of a Hugging Face folder, opened lazily, read by slice."""

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, Any] = {}
        index = path / "model.safetensors.index.json"
        if index.exists():
            try:
                self.files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index} is not an index of safetensors ({error!r}); fetch the file again") from None
        elif (path / "model.safetensors").exists():
            self.files = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            raise ConfigError(f"{path} holds no model.safetensors; convert the weights to safetensors first")

    def slice(self, name: str):
        try:
            return self._file(self.files[name]).get_slice(name)
        except SafetensorError:
            file = self.path / self.files[name]
            raise ConfigError(f"{file} lacks {name}, which the index says it holds; fetch both again") from None

    def _file(self, name: str):
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, "pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self.path / name} cannot be read: {error}; fetch the file again") from None
        return self._open[name]

    def check(self, arch: Architecture) -> None:
        """Raise ConfigError for a tensor that is missing, unknown or of another shape than config.json says."""
        wanted = shapes(arch)
        missing = sorted(set(wanted) - set(self.files))
        if missing:
            raise ConfigError(f"{self.path} lacks {len(missing)} tensors, the first is {missing[0]}; fetch it again")
        unknown = sorted(n for n in set(self.files) - set(wanted) if not n.endswith(IGNORED))
        if arch.tied_embeddings:
            unknown = [name for name in unknown if name != "lm_head.weight"]
        if unknown:
            raise ConfigError(
                f"{self.path} holds {len(unknown)} tensors that config.json does not account for, the first is "
                f"{unknown[0]}; is config.json the one that belongs to these weights?"
            )
        for name, shape in wanted.items():
            found = tuple(self.slice(name).get_shape())
            if found != shape:
                raise ConfigError(f"{self.path}: {name} has shape {found}, config.json says {shape}")


@torch.no_grad()
def load(model: nn.Module, arch: Architecture, place: Place, tick: Tick = silent) -> None:
    """Fill this rank's parameters from `arch.folder`, reading only their slices; padded vocabulary rows become 0."""
    done, total = 0, sum(parameter.numel() for parameter in model.parameters())
    for parameter, value in tensors(model, arch, place):
        parameter.copy_(value)
        done += parameter.numel()
        tick(done, total)


def tensors(
    model: nn.Module, arch: Architecture, place: Place, dtype: torch.dtype | None = None
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each of this rank's parameters with what `arch.folder` has for it, in the parameter's dtype or in `dtype`."""
    folder = Folder(arch.folder)
    folder.check(arch)
    parameters = dict(model.named_parameters())
    for name, parts in pieces(arch, place):
        parameter = parameters.pop(name)
        whole = torch.zeros(parameter.shape, dtype=dtype or parameter.dtype)
        for piece in parts:
            if piece.length == 0:
                continue  # a tensor rank beyond the real vocabulary; safetensors refuses the empty slice
            source = slice(piece.source, piece.source + piece.length)
            view = folder.slice(piece.name)
            value = view[source] if piece.dim == 0 else view[:, source]
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
def export(
    model: nn.Module,
    arch: Architecture,
    mesh: Mesh,
    layers: tuple[int, ...],
    destination: Path,
    tick: Tick = silent,
) -> None:
    """Write the model as a Hugging Face folder that `transformers` loads. Every rank must call.

    Tensors travel one at a time to the writer, each part from the first rank that holds it. The folder appears under
    its name only when it is complete. Raises RunDirectoryError, on the writer and once it has heard the other ranks
    out, when it cannot be written.
    """
    parameters = dict(model.named_parameters())
    owners = places(mesh, layers)
    writer = _Writer(arch, destination) if mesh.is_writer else None
    sent: set[Piece] = set()
    for pipeline in range(mesh.pipeline.size):
        stage = {rank: pieces(arch, place) for rank, place in owners.items() if place.pipeline == pipeline}
        for entries in zip(*stage.values(), strict=True):  # the slices of one tensor, one after the other
            for rank, (name, parts) in zip(stage, entries, strict=True):
                if sent.issuperset(part for part in parts if part.length):
                    continue  # a norm of another tensor rank, what only the experts' grid has several places for
                sent.update(parts)
                value = collectives.send_to_first(
                    parameters[name] if mesh.rank == rank else None, rank, mesh.world.group
                )
                if writer is not None and value is not None:
                    writer.guard(writer.put, value.cpu(), parts)
                    tick(*writer.progress())
    if writer is not None:
        writer.guard(writer.close)
        if writer.failure is not None:
            shutil.rmtree(writer.partial, ignore_errors=True)
            raise RunDirectoryError(f"{destination} cannot be written ({writer.failure})") from writer.failure


class _Writer:
    """Puts pieces together into tensors, and tensors into files of at most SHARD_BYTES (or of one tensor)."""

    def __init__(self, arch: Architecture, destination: Path):
        self.arch, self.destination = arch, destination
        self.partial = destination.with_name(destination.name + ".partial")
        self.failure: OSError | SafetensorError | None = None
        self.guard(self._begin)
        self.shapes = shapes(arch)
        self.missing = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        self.open: dict[str, Tensor] = {}
        self.ready: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.total = 0

    def guard(self, action: Callable, *args: Any) -> None:
        """Do it unless something has failed; a failure is kept, so that whoever sends can be heard out."""
        if self.failure is None:
            try:
                action(*args)
            except (OSError, SafetensorError) as error:
                self.failure = error

    def progress(self) -> tuple[int, int]:
        """Numbers received, of how many."""
        total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return total - sum(self.missing.values()), total

    def _begin(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def put(self, value: Tensor, parts: list[Piece]) -> None:
        for piece in parts:
            if self.missing[piece.name] == 0:
                continue  # the tied output layer's copy, a replicated norm of another tensor rank
            shape = self.shapes[piece.name]
            tensor = self.open.setdefault(piece.name, torch.empty(shape, dtype=value.dtype))
            part = value.narrow(piece.dim, piece.start, piece.length)
            tensor.narrow(piece.dim, piece.source, piece.length).copy_(part)
            self.missing[piece.name] -= part.numel()
            if self.missing[piece.name] == 0:
                tensor = self.open.pop(piece.name)
                if self.ready and self._ready_bytes() + tensor.nbytes > SHARD_BYTES:
                    self._flush()
                self.ready[piece.name] = tensor

    def _ready_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.ready.values())

    def _flush(self) -> None:
        save_file(self.ready, self.partial / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(self.ready))
        self.total += self._ready_bytes()
        self.ready = {}

    def close(self) -> None:
        incomplete = [name for name, count in self.missing.items() if count]
        if incomplete:
            raise AssertionError(f"{len(incomplete)} tensors incomplete, the first is {incomplete[0]}")
        dtype = str(next(iter(self.ready.values())).dtype).removeprefix("torch.")
        self._flush()
        count = len(self.files)
        weight_map: dict[str, str] = {}
        for n, names in enumerate(self.files):
            file = "model.safetensors" if count == 1 else f"model-{n + 1:05d}-of-{count:05d}.safetensors"
            (self.partial / f"part-{n}").rename(self.partial / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = {key: value for key, value in self.arch.raw.items() if key != "torch_dtype"} | {"dtype": dtype}
        (self.partial / "config.json").write_text(json.dumps(config, indent=2))
        for source in self.arch.folder.iterdir():  # the tokenizer, the generation settings
            companion = source.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in source.name
            if source.is_file() and companion and not (self.partial / source.name).exists():
                shutil.copy2(source, self.partial)
        shutil.rmtree(self.destination, ignore_errors=True)
        self.partial.rename(self.destination)
