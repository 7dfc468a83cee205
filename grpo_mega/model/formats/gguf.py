"""A GGUF file of the Llama architecture -> a Hugging Face folder, so that a model shipped as GGUF can be post-trained.

What differs between the two formats, and is undone here:
- weights are quantised in blocks; they are dequantised to float32, the width in which `scale * integer + minimum` was
  defined. bfloat16 would round the 4-bit formats a second time (their products need 15 bits, bfloat16 has 8), and
  float16 the sums;
- llama.cpp rotates neighbouring pairs (2i, 2i+1) of a head, Hugging Face the pairs (i, i + d/2): llama.cpp permuted the
  rows of Q and K for it;
- the tokenizer is stored as bare lists. transformers' own loader ignores `tokenizer.ggml.pre` and so splits numbers
  after several spaces unlike the tokenizer the model was trained with; here the pre-tokenizer is the named one.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats.hugging_face import Writer
from grpo_mega.model.names import shapes

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent: tied to the embedding
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> how text is cut before byte-pair merges
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}


class GgufFile:
    """A GGUF file as `Weights`: float32, one tensor dequantised at a time.

    beside: an empty folder, which gets config.json, the tokenizer with its chat template, and generation_config.json.
    Raises ConfigError for a missing or damaged file, an architecture other than llama, and a tokenizer other than
    byte-level BPE of a known pre-tokenizer.
    """

    def __init__(self, source: Path, beside: Path):
        self.source, self._reader = source, _open(source)
        fields = _Fields(source, self._reader)
        config = _config(fields, self._reader.tensors)
        tokenizer = _tokenizer(fields, config.max_position_embeddings)
        beside.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(beside)
        _generation_config(fields).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        self.arch = read_architecture(beside)
        self._heads = {"q_proj": self.arch.num_heads, "k_proj": self.arch.num_kv_heads}
        self._tensors = {}
        for tensor in self._reader.tensors:
            if (name := _name(tensor.name)) is None:
                raise ConfigError(
                    f"{source}: tensor {tensor.name!r} has no place in a Llama; the file cannot be converted"
                )
            self._tensors[name] = tensor

    def check(self) -> None:
        wanted = shapes(self.arch)
        if missing := [name for name in wanted if name not in self._tensors]:
            raise ConfigError(
                f"{self.source} lacks {len(missing)} tensors, the first {missing[0]}; fetch or convert it again"
            )
        for name, tensor in self._tensors.items():
            found = tuple(int(length) for length in reversed(tensor.shape))
            if name not in wanted:
                raise ConfigError(
                    f"{self.source}: tensor {tensor.name!r} has no place in this Llama; the file cannot be converted"
                )
            if found != wanted[name]:
                raise ConfigError(
                    f"{self.source}: {tensor.name!r} has shape {found}, the metadata say {wanted[name]}; fetch or "
                    "convert the file again"
                )

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def stored(self) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        for tensor in self._reader.tensors:
            kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        return {"stored as": kinds}

    def dropped(self) -> dict[str, str]:
        return {}

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ConfigError(
                f"{self.source}: {tensor.name!r} is of type {kind}, which gguf cannot dequantise"
            ) from None
        if (kind := name.split(".")[-2]) in self._heads:
            weight = _halves(weight, self._heads[kind])
        whole = torch.from_numpy(np.require(weight, requirements=["C", "W"]))
        return whole.narrow(dim, start, whole.shape[dim] - start if length is None else length).contiguous()


def gguf_to_hugging_face(
    source: Path, destination: Path, tick: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Convert `source` into the new folder `destination`: config, float32 weights, tokenizer with chat template.

    The folder is written under another name and renamed when whole: if it exists, it is complete. One tensor is in
    memory at a time; `tick` is told how many are converted. Raises ConfigError as `GgufFile`, for a tensor that is
    unknown or missing, and for a destination that exists.
    """
    if destination.exists():
        raise ConfigError(f"{destination} exists; remove it to convert {source.name} again")
    with tempfile.TemporaryDirectory() as beside:
        weights = GgufFile(source, Path(beside))
        weights.check()
        names = list(shapes(weights.arch))
        writer = Writer(weights.arch, destination, dict.fromkeys(names, torch.float32))
        try:
            for count, name in enumerate(names, 1):
                writer.put(name, weights.read(name))
                tick(count, len(names))
            writer.close()
        finally:
            shutil.rmtree(writer.partial, ignore_errors=True)


class _Fields:
    """The file's metadata by key."""

    def __init__(self, source: Path, reader: GGUFReader) -> None:
        self._source, self._reader = source, reader
        if (found := self["general.architecture"]) != "llama":
            raise ConfigError(f"{source}: general.architecture={found!r} cannot be converted; give a llama GGUF")

    def __getitem__(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise ConfigError(f"{self._source} lacks the metadata key {key!r}; convert it from the original again")
        return field.contents()

    def get(self, key: str, default: Any = None) -> Any:
        return default if self._reader.get_field(key) is None else self[key]

    def refuse(self, key: str, *accepted: Any) -> None:
        """Raise ConfigError unless `key` is absent or holds one of the accepted values."""
        if (found := self.get(key)) is not None and found not in accepted:
            known = f"; known: {', '.join(map(str, accepted))}" if accepted else ""
            raise ConfigError(f"{self._source}: {key}={found!r} cannot be converted{known}")


def _open(source: Path) -> GGUFReader:
    if not source.is_file():
        raise ConfigError(f"{source} is no file; give the path of a GGUF file")
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:  # what a truncated file makes it raise
        raise ConfigError(f"{source} is not a whole GGUF file ({error}); fetch it again") from error


def _config(fields: _Fields, tensors: list[ReaderTensor]) -> LlamaConfig:
    from transformers import LlamaConfig  # seconds to import

    fields.refuse("llama.rope.scaling.type", "none")
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    fields.refuse("llama.attention.value_length", head_dim)
    fields.refuse("llama.rope.dimension_count", head_dim)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields["llama.context_length"],
        # stored as float32: 1e-5 comes back as 9.99999974e-06; its shortest float32 spelling is the number meant
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in tensors),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _generation_config(fields: _Fields) -> Any:
    """Generation ends at the end of sequence and, where the file names another one, at the end of turn."""
    from transformers import GenerationConfig

    ends = [fields["tokenizer.ggml.eos_token_id"]]
    if (turn := fields.get("tokenizer.ggml.eot_token_id", ends[0])) not in ends:
        ends.append(turn)
    return GenerationConfig(
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends,
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None for an unknown one."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return _TOP.get(name)
    layer, part = match.groups()
    return f"model.layers.{layer}.{_LAYER[part]}.weight" if part in _LAYER else None


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads, d/2, 2] (pairs are neighbours, llama.cpp) -> [heads, 2, d/2] (pairs lie d/2 apart)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: _Fields, max_length: int) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    fields.refuse("tokenizer.ggml.model", "gpt2")
    fields.refuse("tokenizer.ggml.pre", *_PRE_TOKENIZERS)
    fields.refuse("tokenizer.ggml.add_bos_token", False)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]]
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            (backend.add_special_tokens if added.special else backend.add_tokens)([added])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in named.items() if index is not None},
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer
