"""What a checkpoint is, without loading it: format, shapes, types, sizes, tokenizer, and a run's state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_mega.convert.options import REPORT
from grpo_mega.convert.report import describe_tokenizer
from grpo_mega.convert.source import Source
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.errors import CheckpointError, DataError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.formats.hugging_face import TOKENIZER_MARKS
from grpo_mega.model.names import shapes

FIELDS = (  # of an Architecture: what is not its default is shown
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "tied_embeddings",
    "context_length", "num_experts", "experts_per_token", "expert_ffn_size", "shared_ffn_size",
)  # fmt: skip


def describe(source: Source) -> dict[str, Any]:
    """The whole of it as JSON can hold it. Raises GrpoMegaError where the checkpoint is damaged."""
    source.check()
    arch, path = source.arch, source.path
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(shape),
            "dtype": str(source.dtype(name)).removeprefix("torch."),
            "bytes": math.prod(shape) * source.dtype(name).itemsize,
        }
        for name, shape in shapes(arch).items()
    ]
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "path": str(path),
        "format": source.kind,
        "architecture": arch.raw["architectures"][0],
        **{field: value for field in FIELDS if (value := getattr(arch, field))},
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "tensor_bytes": sum(tensor["bytes"] for tensor in tensors),
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "stored": source.weights.stored(),
        "left_out": source.dropped(),
        "state": _state(source),
        "tokenizer": _tokenizer(arch),
        "conversion": _verdict(path),
        "tensors": tensors,
    }


def _tokenizer(arch: Architecture) -> dict[str, Any] | str | None:
    if not any((arch.folder / name).exists() for name in TOKENIZER_MARKS):
        return None
    try:
        return describe_tokenizer(load_tokenizer(arch.folder), arch)
    except DataError as error:
        return f"cannot be used: {error}"


def _state(source: Source) -> dict[str, Any]:
    """Of a run's checkpoint: the step, the position among the prompts, the layout that wrote it; of Megatron-LM's: the
    iteration and the layout in its arguments. Any layout loads either."""
    folder = getattr(source.weights, "path", source.path)
    if source.kind != "megatron":
        return {}
    if (folder / "trainer.json").is_file():
        try:
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{folder / 'trainer.json'} is damaged ({error}); take another checkpoint") from None
        return {key: state[key] for key in ("step", "layout", "prompts") if key in state}
    if not (folder / ".metadata").is_file():
        return {"ranks": len(list(folder.glob("mp_rank_*")))}
    from grpo_mega.model.formats.torch_dist import read_settings

    settings = read_settings(folder)
    said = vars(settings["args"]) if "args" in settings else {}
    axes = ("tensor", "pipeline", "expert", "expert_tensor")
    names = {axis: f"{axis}{'' if axis == 'expert_tensor' else '_model'}_parallel_size" for axis in axes}
    layout = {axis: said[name] for axis, name in names.items() if said.get(name)}
    return {"iteration": settings.get("iteration"), "layout": layout}


def _verdict(path: Path) -> str | None:
    file = path / REPORT
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{file} cannot be read"


def lines(found: dict[str, Any], every_tensor: bool) -> Iterator[str]:
    """For a person: the layers, which are alike, once, unless every tensor is asked for."""
    yield f"{found['path']}: {found['format']}, {found['architecture']}"
    yield "  " + ", ".join(f"{field} {found[field]}" for field in FIELDS if field in found)
    yield (
        f"  {found['parameters']:,} weights in {len(found['tensors'])} tensors, {found['tensor_bytes'] / 1e9:.3f} GB; "
        f"{found['files']} files, {found['file_bytes'] / 1e9:.3f} GB"
    )
    for key, value in found["stored"].items():
        yield f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}"
    for key, value in found["state"].items():
        yield f"  {key}: {json.dumps(value)}"
    for name, reason in found["left_out"].items():
        yield f"  left out: {name} ({reason})"
    tokenizer = found["tokenizer"]
    if isinstance(tokenizer, dict):
        rows = tokenizer["embedding_rows_without_a_token"]
        yield f"  tokenizer: {tokenizer['tokens']} tokens ({rows} rows of the embedding have none), stops at " + (
            ", ".join(map(str, tokenizer["stop_token_ids"]))
            + ("" if tokenizer["chat_template_sha256"] else ", no template")
        )
    else:
        yield f"  tokenizer: {tokenizer or 'none'}"
    yield f"  conversion: {found['conversion'] or 'no report beside it'}"
    yield from _tensor_lines(found["tensors"], every_tensor)


def _tensor_lines(tensors: list[dict[str, Any]], every: bool) -> Iterator[str]:
    width = max(len(tensor["name"]) for tensor in tensors)
    seen: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        parts = tensor["name"].split(".")
        generic = ".".join("N" if part.isdigit() else part for part in parts)
        key = (generic, str(tensor["shape"]), tensor["dtype"])
        seen[key] = seen.get(key, 0) + 1
        if every:
            yield f"  {tensor['name']:<{width}}  {tensor['dtype']:<9} {tensor['shape']}"
    if not every:
        for (generic, shape, dtype), count in seen.items():
            yield f"  {generic:<{width}}  {dtype:<9} {shape}" + (f"  x {count}" if count > 1 else "")
