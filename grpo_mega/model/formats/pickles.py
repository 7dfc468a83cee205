"""Reading pickles of others without running them: what may be in a checkpoint is named here, all else is an error.

A pickle names functions and calls them. In a distributed checkpoint `.metadata` is one, made of torch's own small
records; in common.pt, in objects among the shards and in Megatron-LM's older checkpoints torch.save puts tensors beside
one, and settings that hold enumerations of Megatron's. Records are rebuilt by the classes named below; whatever
Megatron or NumPy made is replaced by an inert `Foreign`, whose module is never imported; no weight depends on it.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from grpo_mega.errors import ConfigError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
RECORDS = {  # what describes tensors and where they lie: modules, and what is taken from each
    _METADATA: (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    _PLANNER: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("set", "frozenset", "list", "dict", "tuple"),
}  # fmt: skip
FOREIGN_MODULES = ("megatron", "numpy", "pathlib", "transformer_engine")  # replaced, never imported
FOREIGN_NAMES = ("argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_io.BytesIO")


class Foreign:
    """Stands for an object of a class that is not imported: what it was made from, and its fields."""

    def __init__(self, *values: Any):
        self.values = values

    def __setstate__(self, state: Any) -> None:
        fields = state[0] if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict) else state
        if isinstance(fields, dict):
            self.__dict__.update(fields)


def _is_foreign(name: str) -> bool:
    return name in FOREIGN_NAMES or name.split(".")[0] in FOREIGN_MODULES


class _Records(pickle.Unpickler):
    """An unpickler that knows records alone."""

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return getattr(importlib.import_module(module), name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return value
        if _is_foreign(f"{module}.{name}"):
            return Foreign
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_records(file: Path) -> Any:
    """The object in a pickle of records. Raises ConfigError for a damaged file, and one that names another class."""
    try:
        with file.open("rb") as content:
            return _Records(content).load()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; copy the checkpoint again, whole") from None
    except pickle.UnpicklingError as error:
        name = str(error)
        if re.fullmatch(r"[\w.]+\.\w+", name):
            raise ConfigError(
                f"{file} holds {name}, which has no place in the description of a checkpoint and might run anything: "
                "it was not read; take the checkpoint from where it was made"
            ) from None
        raise ConfigError(f"{file} is damaged ({name}); copy the checkpoint again") from None
    except Exception as error:  # a pickle that is cut short or changed raises whatever its next bytes ask for
        raise ConfigError(f"{file} is damaged ({type(error).__name__}: {error}); copy the checkpoint again") from None


def read_saved(source: Path | Window, called: Path, *, mapped: bool = False) -> Any:
    """What torch.save wrote: tensors, plain values and settings; of Megatron's own objects a `Foreign` each.

    mapped: tensors stay on the disk until they are read; `source` is then a path. called: its name in messages.
    Raises ConfigError for a damaged file, and one that holds anything else.
    """
    try:
        known = torch.serialization.get_unsafe_globals_in_checkpoint(source)  # type: ignore[arg-type]
        if isinstance(source, Window):
            source.seek(0)
        others = sorted(name for name in known if not _is_foreign(name))
        if others:
            raise ConfigError(
                f"{called} holds {', '.join(others)}, which is neither a weight nor a setting of Megatron's and might "
                "run anything: it was not read; load the file with a program that you trust, and save it without"
            )
        with torch.serialization.safe_globals([(Foreign, name) for name in known]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"{called} cannot be read: {error.strerror or error}; copy the checkpoint again") from None
    except ConfigError:
        raise
    except Exception as error:  # torch's readers raise whatever the damage leads to
        words = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:200]
        raise ConfigError(f"{called} is damaged ({type(error).__name__}: {words}); copy the checkpoint again") from None


class Window(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file of their own: of what lies outside nothing is read."""

    def __init__(self, file: Path, offset: int, length: int):
        self._file, self._offset, self._length = file.open("rb", buffering=0), offset, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        self._file.seek(self._offset + base + position)
        return base + position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        room = max(0, min(len(view), self._length - self.tell()))
        return self._file.readinto(view[:room]) or 0

    def close(self) -> None:
        self._file.close()
        super().close()
