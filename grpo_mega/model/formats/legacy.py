"""Megatron-LM's checkpoints of old (--ckpt-format torch): a pickle of every rank's state, read as `Weights`.

mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt has the state of tensor rank TT, pipeline rank PPP and expert rank EEE; where
only tensor ranks share the model both others are left out. A state has `model`, or `model0`, `model1`, ... of an
interleaved pipeline: megatron-core's parameters under the names of that rank (layers and experts numbered from its own
first), or those of --use-legacy-models. Slices are what `families/table.cut` says: every rank's share of each tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import Piece, Whole, cut
from grpo_mega.model.formats.boxes import moved, overlap, part, piece_box, requested
from grpo_mega.model.formats.hugging_face import FLOATS
from grpo_mega.model.formats.pickles import read_saved
from grpo_mega.model.formats.sharded_names import EXTRA_STATE, FUSED
from grpo_mega.model.names import all_tensors, shapes

_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_OLD_NAMES = (  # --use-legacy-models -> megatron-core; an older one's norms are called layernorm as well
    (r"language_model\.embedding\.", "embedding."),
    (r"language_model\.output_layer\.", "output_layer."),
    (r"word_embeddings_for_head\.weight", "output_layer.weight"),
    (r"language_model\.(?:encoder|transformer)\.final_(?:layer)?norm\.", "decoder.final_layernorm."),
    (r"language_model\.(?:encoder|transformer)\.layers\.", "decoder.layers."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(?:layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.(?:self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(?:self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
)
_MODEL = re.compile(r"model(\d*)")
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12]\.weight)(\d+)")  # Transformer Engine's experts of a rank
_EXPERT = re.compile(r"(.*\.mlp\.experts\.local_experts\.)(\d+)(\..*)")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
Place = tuple[int, int, int]  # tensor, pipeline and expert rank


class LegacyCheckpoint:
    """The model's tensors of such a checkpoint; they stay on the disk until they are read."""

    def __init__(self, arch: Architecture, folder: Path, allow_pickle: bool = False):
        """folder: the one with mp_rank_... in it. Raises ConfigError, for one that may not be opened too."""
        self.arch, self.path = arch, folder
        self._shapes = shapes(arch)
        files = open_ranks(folder, allow_pickle)
        self.sizes = tuple(max(numbers) + 1 for numbers in zip(*files, strict=True))
        self._check_experts(files[0, 0, 0])
        self._tensors = self._by_name({place: _models(state, folder) for place, state in files.items()})
        self._held: dict[str, list[tuple[Tensor, Piece]]] = {}  # parts of Hugging Face's tensors

    def _check_experts(self, state: Mapping[str, Any]) -> None:
        slices = getattr(state.get("args"), "expert_tensor_parallel_size", None)
        if self.arch.num_experts and slices not in (None, self.sizes[0]):
            raise ConfigError(
                f"{self.path}: expert_tensor_parallel_size={slices} beside tensor_model_parallel_size={self.sizes[0]}; "
                "files of that layout do not say which part of an expert they hold: save it with --ckpt-format "
                "torch_dist"
            )
        if self.arch.num_experts % self.sizes[2]:
            raise ConfigError(
                f"{self.path} divides experts by {self.sizes[2]}, config.json has {self.arch.num_experts}"
            )

    def _by_name(self, states: Mapping[Place, list[dict[str, Tensor]]]) -> dict[str, dict[Place, Tensor]]:
        """Every rank's tensors under the names that they have in the whole model (see `all_tensors`)."""
        found: dict[str, dict[Place, Tensor]] = {}
        experts = self.arch.num_experts // self.sizes[2]
        parts = len(states[0, 0, 0])
        first = 0
        for number, pipeline in product(range(parts), range(self.sizes[1])):  # the model's stages in their order
            layers = 0
            for tensor, expert in product(range(self.sizes[0]), range(self.sizes[2])):
                place = (tensor, pipeline, expert)
                for name, value in states[place][number].items():
                    if match := _LAYER.fullmatch(name):
                        layers = max(layers, int(match[2]) + 1)
                        name = f"{match[1]}{int(match[2]) + first}{match[3]}"
                    if match := _EXPERT.fullmatch(name):
                        name = f"{match[1]}{int(match[2]) + expert * experts}{match[3]}"
                    found.setdefault(name, {})[place] = value
            first += layers
        return found

    def check(self) -> None:
        wanted = {whole.name for whole in all_tensors(self.arch)}
        spare = {"output_layer.weight"} if self.arch.tied_embeddings else set()  # the last stage's copy
        if unknown := sorted(set(self._tensors) - wanted - spare):
            raise ConfigError(
                f"{self.path} holds {len(unknown)} tensors that config.json does not account for, the first is "
                f"{unknown[0]}; is config.json the one that belongs to these weights?"
            )
        for whole in all_tensors(self.arch):
            for tensor in range(self.sizes[0]):
                self._check_slice(whole, tensor)

    def _check_slice(self, whole: Whole, tensor: int) -> None:
        value = self._slice(whole, tensor)
        dim, ranks = whole.row.cut, self.sizes[0]
        wanted = tuple(size // ranks if axis == dim else size for axis, size in enumerate(whole.shape))
        found = None if value is None else tuple(value.shape)
        enough = whole.padded and found is not None and found[0] * ranks >= whole.shape[0] and found[1:] == wanted[1:]
        if found != wanted and not enough:
            words = "is not there" if found is None else f"has shape {found}"
            raise ConfigError(
                f"{self.path}: {whole.name} of tensor rank {tensor} {words}, config.json's model has {wanted}; is it "
                "the one that belongs to these weights?"
            )
        if value is not None and value.dtype not in FLOATS:
            raise ConfigError(
                f"{self.path}: {whole.name} is of type {value.dtype}; supported: {', '.join(map(str, FLOATS))}"
            )

    def _slice(self, whole: Whole, tensor: int) -> Tensor | None:
        """What a tensor rank has of a tensor, from the first rank that has it."""
        places = self._tensors.get(whole.name, {})
        return next((value for place, value in sorted(places.items()) if place[0] == tensor), None)

    def _parts(self, name: str) -> list[tuple[Tensor, Piece]]:
        """What a Hugging Face tensor consists of."""
        if not self._held:
            for whole in all_tensors(self.arch):
                ranks = self.sizes[0] if whole.row.cut is not None else 1  # what is not cut, each rank has whole
                for tensor in range(ranks):
                    value = self._slice(whole, tensor)
                    assert value is not None, "`check` comes before `read`"
                    for piece in cut(whole, tensor, ranks, value.shape[whole.row.cut or 0] * ranks):
                        self._held.setdefault(piece.name, []).append((value, piece))
        return self._held[name]

    def stored(self) -> dict[str, Any]:
        """See `Weights.stored`."""
        kinds = Counter(str(self.dtype(name)).removeprefix("torch.") for name in self._shapes)
        tensor, pipeline, expert = self.sizes
        return {"ranks": {"tensor": tensor, "pipeline": pipeline, "expert": expert}, "stored as": dict(kinds)}

    def dropped(self) -> dict[str, str]:
        if self.arch.tied_embeddings and "output_layer.weight" in self._tensors:
            return {"output_layer.weight": "the last stage's copy of the embedding"}
        return {}

    def dtype(self, name: str) -> torch.dtype:
        return self._parts(name)[0][0].dtype

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        box = requested(self._shapes[name], dim, start, length)
        result = torch.empty([high - low for low, high in box], dtype=self.dtype(name))
        for value, piece in self._parts(name):
            shared = overlap(box, piece_box(piece, self._shapes[name]))
            if shared is not None:
                there = moved(shared, piece.dim, piece.start - piece.source)
                part(result, shared, [low for low, _ in box]).copy_(part(value, there, [0] * len(box)))
        return result


def open_ranks(folder: Path, allow_pickle: bool) -> dict[Place, dict[str, Any]]:
    """Every rank's state. Raises ConfigError for files that may not be opened, are damaged or not there."""
    if not allow_pickle:
        raise ConfigError(
            f"{folder} holds pickles, which may run anything when they are read; save it from Megatron-LM with "
            "--ckpt-format torch_dist, or convert with --allow-pickle (only weights and settings are let through)"
        )
    named = {path: match for path in sorted(folder.iterdir()) if (match := _FOLDER.fullmatch(path.name))}
    states = {path: _open(path / "model_optim_rng.pt") for path in named}
    args = next(iter(states.values())).get("args")
    piped = getattr(args, "pipeline_model_parallel_size", 1) > 1
    found: dict[Place, dict[str, Any]] = {}
    for path, match in named.items():
        tensor, second, third = (int(number or 0) for number in match.groups())
        alone = match[3] is None and not piped and getattr(args, "expert_model_parallel_size", 1) > 1
        found[(tensor, 0, second) if alone else (tensor, second, third)] = states[path]
    counts = [max(numbers) + 1 for numbers in zip(*found, strict=True)]
    for place in product(*map(range, counts)):
        if place not in found:
            raise ConfigError(
                f"{folder} holds {len(found)} folders mp_rank_... and none of tensor rank {place[0]}, pipeline rank "
                f"{place[1]}, expert rank {place[2]}; copy the checkpoint again, whole"
            )
    return found


def _open(file: Path) -> dict[str, Any]:
    state = read_saved(file, file, mapped=True)
    if not isinstance(state, dict) or not any(_MODEL.fullmatch(str(key)) for key in state):
        raise ConfigError(f"{file} holds no state of a model; is it one of Megatron-LM's?")
    if float(state.get("checkpoint_version", 0)) < 2.0:
        raise ConfigError(
            f"{file} is of checkpoint version {state.get('checkpoint_version', 0)}, whose queries, keys and values lie "
            "in another order; load and save it with a newer Megatron-LM"
        )
    return state


def _models(state: Mapping[str, Any], folder: Path) -> list[dict[str, Tensor]]:
    """The model's parts in this rank, in the model's order, under megatron-core's names without Transformer Engine."""
    keys = sorted((key for key in state if _MODEL.fullmatch(str(key))), key=lambda key: int(key[5:] or 0))
    parts: list[dict[str, Tensor]] = []
    for key in keys:
        parts.append({})
        for name, value in _flat(state[key]):
            if EXTRA_STATE in name or name.endswith("rotary_pos_emb.inv_freq") or value is None:
                continue
            if not isinstance(value, Tensor):
                raise ConfigError(f"{folder}: {name} is {type(value).__name__}, not a tensor; it cannot be converted")
            parts[-1][_core_name(name)] = value
    return parts


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value); models of old nest their parts' states."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _core_name(name: str) -> str:
    for pattern, now in _OLD_NAMES:
        name = re.sub(pattern, now, name)
    for plain, fused in FUSED.items():
        name = name.removesuffix(fused) + plain if name.endswith("." + fused) else name
    if match := _GROUPED.fullmatch(name):
        name = f"{match[1]}local_experts.{match[3]}.{match[2]}"
    return name
