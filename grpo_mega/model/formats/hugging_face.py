"""Hugging Face folders: safetensors in one file or several, read by slice and written tensor by tensor."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families.table import dropped
from grpo_mega.model.names import shapes

SHARD_BYTES = 4 << 30
SCALES = "_scale_inv"  # behind a weight's name: of its 8-bit blocks
DTYPES = {  # safetensors' words
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model")  # one of them is in every folder with a tokenizer
_COMPANIONS = (".json", ".jinja", ".model", ".txt")
_ABOUT_WEIGHTS = (
    "metadata.json",
    "trainer.json",
    "conversion_report.json",
    "latest_checkpointed_iteration.txt",
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Folder:
    """The safetensors of a Hugging Face folder, opened lazily. Weights in 8-bit blocks (DeepSeek-V3's) are read as
    bfloat16: arXiv:2412.19437, section 3.3.2, weight * scale_inv of its block."""

    def __init__(self, arch: Architecture, allow_pickle: bool = False):
        """allow_pickle: read pytorch_model.bin too, where there are no safetensors; by torch's loader of weights only,
        which refuses whatever else a pickle may hold."""
        self.arch, self.path = arch, arch.folder
        self._open: dict[str, Any] = {}
        self._blocks = (arch.raw.get("quantization_config") or {}).get("weight_block_size", (128, 128))
        files = self._in_files(allow_pickle)
        self._named = {self._alone(name): name for name in files}
        self.files = {name: files[named] for name, named in self._named.items()}

    def _in_files(self, allow_pickle: bool) -> dict[str, str]:
        """The folder's tensors, under its own names, with the file that holds each."""
        for name in ("model.safetensors", *(["pytorch_model.bin"] if allow_pickle else [])):
            index = self.path / f"{name}.index.json"
            if index.exists():
                try:
                    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{index} is not an index of safetensors ({error!r}); fetch the file again"
                    ) from None
            if (self.path / name).exists():
                return dict.fromkeys(self._file(name).keys(), name)
        if any(self.path.glob("pytorch_model*.bin")):
            raise ConfigError(
                f"{self.path} holds pytorch_model.bin, a pickle, which may run anything when it is read; take "
                "safetensors from the publisher, or convert with --allow-pickle (only weights are let through)"
            )
        raise ConfigError(f"{self.path} holds no model.safetensors; convert the weights to safetensors first")

    def slice(self, name: str):
        """safetensors' own view of a tensor."""
        try:
            return self._file(self.files[name]).get_slice(self._named[name])
        except SafetensorError:
            file = self.path / self.files[name]
            raise ConfigError(f"{file} lacks {name}, which the index says it holds; fetch both again") from None

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name + SCALES in self.files else DTYPES[self.slice(name).get_dtype()]

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        view = self.slice(name)
        length = view.get_shape()[dim] - start if length is None else length
        stop = start + length
        values = view[start:stop] if dim == 0 else view[:, start:stop]
        if name + SCALES not in self.files:
            return values
        scales = self.slice(name + SCALES)[:]
        for axis, block in enumerate(self._blocks):
            low = start if axis == dim else 0
            scales = scales.index_select(axis, torch.arange(low, low + values.shape[axis]) // block)
        return (values.float() * scales).bfloat16()

    def check(self) -> None:
        wanted = shapes(self.arch)
        missing = sorted(set(wanted) - set(self.files))
        if missing:
            raise ConfigError(f"{self.path} lacks {len(missing)} tensors, the first is {missing[0]}; fetch it again")
        unknown = sorted(name for name in self.files if name not in wanted and not self._explained(name, wanted))
        if unknown:
            raise ConfigError(
                f"{self.path} holds {len(unknown)} tensors that config.json does not account for, the first is "
                f"{unknown[0]}; is config.json the one that belongs to these weights?"
            )
        for name, shape in wanted.items():
            view = self.slice(name)
            found, scaled = tuple(view.get_shape()), name + SCALES in self.files
            if found != shape:
                raise ConfigError(f"{self.path}: {name} has shape {found}, config.json says {shape}")
            if DTYPES.get(view.get_dtype()) not in FLOATS and not scaled:
                raise ConfigError(
                    f"{self.path}: {name} is of type {view.get_dtype()}; supported: "
                    f"{', '.join(WORDS[dtype] for dtype in FLOATS)}, and F8_E4M3 with {SCALES} beside it"
                )
            if scaled:
                blocks = tuple(math.ceil(length / block) for length, block in zip(shape, self._blocks, strict=True))
                if (found := tuple(self.slice(name + SCALES).get_shape())) != blocks:
                    raise ConfigError(f"{self.path}: {name}{SCALES} has shape {found}; its weight has {blocks} blocks")

    def stored(self) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        for name in self.files:
            word = self.slice(name).get_dtype()
            kinds[word] = kinds.get(word, 0) + 1
        return {"safetensors files": len(set(self.files.values())), "stored as": kinds}

    def dropped(self) -> dict[str, str]:
        """Tensors that the model does not have, with the reason."""
        return {name: reason for name in self.files if (reason := dropped(self.arch, name)) is not None}

    def _alone(self, name: str) -> str:
        """What a tensor of this folder is called where the language model is alone."""
        prefixes = self.arch.family.prefixes
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(prefix, "") + name.removeprefix(prefix)

    def _explained(self, name: str, wanted: Mapping[str, Any]) -> bool:
        return name.removesuffix(SCALES) in wanted or dropped(self.arch, name) is not None

    def _file(self, name: str):
        if name not in self._open:
            try:
                pickled = name.endswith(".bin")
                self._open[name] = _Pickled(self.path / name) if pickled else safe_open(self.path / name, "pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self.path / name} cannot be read: {error}; fetch the file again") from None
        return self._open[name]


class _Pickled:
    """pytorch_model.bin with the methods of an open safetensors file; its bytes stay on the disk until read."""

    def __init__(self, file: Path):
        try:
            self._tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            words = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:200]
            raise OSError(f"it holds {foreign[1]}, which is no weight" if foreign else words) from error

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _View:
        if name not in self._tensors:
            raise SafetensorError(name)
        return _View(self._tensors[name])


class _View:
    """A tensor with the methods of safetensors' slices."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return WORDS.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, where: Any) -> Tensor:
        return self._tensor[where].clone()


class Writer:
    """A new folder, written aside and renamed when it is complete: each tensor once, in any order, straight to its
    place in its file (safetensors' format: the header's length, the header, the tensors' bytes)."""

    def __init__(self, arch: Architecture, destination: Path, dtypes: Mapping[str, torch.dtype], begins: bool = True):
        """dtypes: of each tensor. Of several processes that write together, the one that `begins` does so before the
        others. Raises OSError, as do all methods."""
        self.arch, self.destination = arch, destination
        self.partial = destination.with_name(destination.name + ".partial")
        self.dtypes, self.shapes = dtypes, shapes(arch)
        self.missing = set(self.shapes)
        self._places: dict[str, tuple[Path, int]] = {}
        if begins:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        files = self._in_files()
        weight_map: dict[str, str] = {}
        for n, names in enumerate(files):
            file = f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
            self._begin(self.partial / file, names, begins)
            weight_map |= dict.fromkeys(names, file)
        if begins and len(files) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    @property
    def nbytes(self) -> int:
        return sum(map(self._bytes, self.shapes))

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def _in_files(self) -> list[list[str]]:
        """Names in model order, in files of at most SHARD_BYTES (or of one tensor)."""
        files: list[list[str]] = [[]]
        size = 0
        for name in self.shapes:
            if files[-1] and size + self._bytes(name) > SHARD_BYTES:
                files.append([])
                size = 0
            files[-1].append(name)
            size += self._bytes(name)
        return files

    def _begin(self, file: Path, names: list[str], creates: bool) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + self._bytes(name)
            word, shape = WORDS[self.dtypes[name]], list(self.shapes[name])
            header[name] = {"dtype": word, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._places[name] = file, 8 + len(text) + header[name]["data_offsets"][0]
        if creates:
            with file.open("wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                out.truncate(8 + len(text) + offset)

    def put(self, name: str, value: Tensor) -> None:
        """Write a whole tensor, in the dtype that was announced."""
        if value.shape != torch.Size(self.shapes[name]) or value.dtype != self.dtypes[name] or name not in self.missing:
            raise AssertionError(f"{name} {tuple(value.shape)} {value.dtype} has no place, or has been written")
        file, offset = self._places[name]
        with file.open("r+b") as out:
            out.seek(offset)
            out.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        self.missing.remove(name)

    def finish(self) -> None:
        """Add what belongs to the weights. The folder is complete, under its temporary name."""
        if self.missing:
            raise AssertionError(f"{len(self.missing)} tensors incomplete, the first is {min(self.missing)}")
        dtype = str(self.dtypes[next(iter(self.shapes))]).removeprefix("torch.")
        write_companions(self.arch, self.partial, dtype)

    def publish(self) -> None:
        """Give the finished folder its name."""
        shutil.rmtree(self.destination, ignore_errors=True)
        self.partial.rename(self.destination)

    def close(self) -> None:
        self.finish()
        self.publish()


def write_companions(arch: Architecture, folder: Path, dtype: str) -> None:
    """config.json for these weights, and what lies beside them in the model's folder: tokenizer, generation rules."""
    left_out = ("torch_dtype", "quantization_config")
    config = {key: value for key, value in arch.raw.items() if key not in left_out}
    config |= {"dtype": dtype, **arch.family.changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for source in companions(arch.folder):
        if not (folder / source.name).exists():
            shutil.copy2(source, folder)


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that are neither its weights nor about them."""
    if not folder.is_dir():
        return []
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _COMPANIONS)
    return [file for file in files if "safetensors" not in file.name and file.name not in _ABOUT_WEIGHTS]
