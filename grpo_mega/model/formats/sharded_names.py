"""Under which keys megatron's distributed checkpoints hold megatron's tensors.

What `sharded_state_dict` makes of a parameter's name (transformer_block.py, moe/experts.py, mlp.py; the same in 0.16.1
and 0.19.2):

- the layer's number leaves the name and becomes a leading axis (`stacked`), unless layers differ among each other, as
  in a model of which some feed-forwards are mixtures: then it stays in the key (`numbered`);
- so does an expert's, behind the layer's axis if there is one: `mlp.experts.experts.linear_fc1.weight`; checkpoints
  saved with `singleton_local_shards` keep it in the key and cut gate and up projection into two tensors (`_w`, `_v`);
- a norm whose linear follows at once belongs to that linear where Transformer Engine computes both, and Megatron-LM
  says so of its local layers too (gpt_layer_specs.py: `sharded_state_dict_keys_map`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import Whole

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
FUSED = {  # a norm's name, and the name it has as a part of the linear behind it
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Part:
    """Rows start .. start + rows of one of megatron's tensors: all of checkpoint tensor `key` at `index` of its leading
    axes; axes: how long those must be."""

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    start: int
    rows: int


def fused_name(arch: Architecture, layer: int, name: str) -> str:
    """A parameter's name within its layer where Transformer Engine computes norms with what follows them.

    It does not before a mixture, whose router comes first, and in latent attention, whose input goes to two linears;
    there the norms of what was compressed join the linears that widen it again.
    """
    latent = arch.latent is not None
    alone = {"pre_mlp_layernorm.weight": arch.is_mixture(layer), "input_layernorm.weight": latent}
    return name if alone.get(name, not latent) else FUSED.get(name, name)


def split_name(whole: Whole) -> tuple[int | None, str]:
    """(number of the layer, name within it without an expert's number) of a tensor of `all_tensors`."""
    match = _LAYER.fullmatch(whole.name)
    if match is None:
        return None, whole.name
    name = match[2]
    if whole.expert is not None:
        name = name.replace(f"local_experts.{whole.expert}.", "experts.", 1)
    return int(match[1]), name


def numbered_layers(arch: Architecture) -> bool:
    """Whether megatron keeps the layers' numbers in the keys of a model."""
    return len({arch.is_mixture(number) for number in range(arch.num_layers)}) > 1


def written_part(arch: Architecture, whole: Whole, *, fused: bool) -> Part:
    """Where a checkpoint that is to be written has the tensor. fused: by `fused_name`."""
    layer, name = split_name(whole)
    if layer is not None and fused:
        name = fused_name(arch, layer, name)
    return _part(arch, whole, layer, name, numbered=numbered_layers(arch))


def found_parts(arch: Architecture, whole: Whole, keys: Container[str]) -> list[Part]:
    """Where a checkpoint with these keys has the tensor; empty where it does not."""
    layer, name = split_name(whole)
    for each in dict.fromkeys((name, *([FUSED[name]] if name in FUSED else []))):
        for numbered in (False, True):
            part = _part(arch, whole, layer, each, numbered=numbered)
            if part.key in keys:
                return [part]
    if layer is not None:
        key = f"decoder.layers.{layer}.{name}"
        if whole.expert is not None:
            key = key.replace("experts.experts.", f"experts.experts.{whole.expert}.", 1)
        if key in keys:
            return [Part(key, (), (), 0, whole.shape[0])]
        if key + "_w" in keys and key + "_v" in keys:
            half = whole.shape[0] // 2
            return [Part(key + "_w", (), (), 0, half), Part(key + "_v", (), (), half, half)]
    return []


def _part(arch: Architecture, whole: Whole, layer: int | None, name: str, *, numbered: bool) -> Part:
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    key = name
    if layer is not None and numbered:
        key = f"decoder.layers.{layer}.{name}"
    elif layer is not None:
        key, index, axes = f"decoder.layers.{name}", (layer,), (arch.num_layers,)
    if whole.expert is not None:
        index, axes = (*index, whole.expert), (*axes, arch.num_experts)
    return Part(key, index, axes, 0, whole.shape[0])


def extra_states(arch: Architecture, part: Part, *, fused: bool) -> Iterator[str]:
    """Keys of the objects that megatron asks for beside a tensor: what its module remembers of FP8, one object for each
    layer and expert (transformer/utils.py). Local linears have one, and it is empty; so have, with Transformer Engine,
    norms of their own and the core of attention."""
    module, _, last = part.key.rpartition(".")
    linear = module.rpartition(".")[2].startswith("linear_")
    offsets, counts = part.index or (0,), part.axes or (1,)
    shard = f"/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, counts))}"
    if last == "weight" and (linear or (fused and module.endswith("layernorm"))):
        yield f"{module}.{EXTRA_STATE}{shard}"
    if fused and part.key.endswith("self_attention.linear_proj.weight"):
        yield f"{module.removesuffix('linear_proj')}core_attention.{EXTRA_STATE}{shard}"
