"""Writing and reading back: tensor by tensor, each process its share, whatever the two formats are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from grpo_mega.convert.options import Options
from grpo_mega.convert.source import Source, digest
from grpo_mega.errors import CheckpointError, ConfigError, GrpoMegaError, RunDirectoryError
from grpo_mega.model.formats import Weights
from grpo_mega.model.formats.hugging_face import Writer
from grpo_mega.model.formats.torch_dist_writer import Layout, TorchDistWriter
from grpo_mega.model.names import float32_names, shapes
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Tick = Callable[[int, int], None]


class Target(Protocol):
    """A destination under its temporary name."""

    partial: Path

    def write(self, mesh: Mesh, tick: Tick) -> None:
        """This process' share. Every rank must call."""
        ...

    def publish(self) -> None:
        """Give it its name; one process."""
        ...


def target_dtypes(source: Source, dtype: str | None) -> dict[str, torch.dtype]:
    """Of each tensor: as the source has it, or `dtype` but for what stays float32."""
    kept = float32_names(source.arch)
    return {
        name: source.dtype(name) if dtype is None or name in kept else DTYPES[dtype] for name in shapes(source.arch)
    }


def check_space(destination: Path, need: int) -> None:
    """Raise ConfigError where the disk has no room for `need` bytes; the nearest folder that exists is asked."""
    folder = next(parent for parent in (destination, *destination.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"{destination} needs {need / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB free; make "
            "room, or give another destination"
        )


class HuggingFaceTarget:
    """A Hugging Face folder."""

    def __init__(self, source: Source, options: Options, dtypes: Mapping[str, torch.dtype], mesh: Mesh):
        self.source, self.dtypes = source, dtypes
        begin = lambda begins: Writer(source.arch, options.destination, dtypes, begins=begins)  # noqa: E731
        first = together(mesh, lambda: begin(True) if mesh.is_writer else None)
        self.writer: Writer = first or begin(False)
        self.partial = self.writer.partial

    def write(self, mesh: Mesh, tick: Tick) -> None:
        names = list(self.writer.shapes)

        def share() -> None:
            for count, name in enumerate(names):
                if count % mesh.world.size == mesh.world.rank:
                    self.writer.put(name, self.source.read(name).to(self.dtypes[name]))
                    tick(count + 1, len(names))

        together(mesh, share)
        for missing in collectives.gather_objects(self.writer.missing, mesh.world.group):
            self.writer.missing &= missing
        together(mesh, self.writer.finish if mesh.is_writer else _nothing)

    def publish(self) -> None:
        self.writer.publish()


class MegatronTarget:
    """A distributed checkpoint of Megatron's."""

    def __init__(self, source: Source, options: Options, dtypes: Mapping[str, torch.dtype], mesh: Mesh):
        parallel = options.parallel
        layout = Layout(parallel.tensor, parallel.pipeline, parallel.expert, parallel.expert_tensor)
        begin = lambda begins: TorchDistWriter(  # noqa: E731
            source,
            options.destination,
            layout,
            dtypes,
            transformer_engine_names=options.names == "te",
            begins=begins,
        )
        first = together(mesh, lambda: begin(True) if mesh.is_writer else None)
        self.writer: TorchDistWriter = first or begin(False)
        self.partial = self.writer.partial

    def write(self, mesh: Mesh, tick: Tick) -> None:
        mine = together(mesh, lambda: self.writer.write(mesh.world.rank, mesh.world.size, tick))
        everyone = collectives.gather_objects(mine, mesh.world.group)
        together(mesh, lambda: self.writer.finish(everyone) if mesh.is_writer else None)

    def publish(self) -> None:
        self.writer.publish()


def read_back(
    source: Source, target: Weights, dtypes: Mapping[str, torch.dtype], known: Mapping[str, str], mesh: Mesh, tick: Tick
) -> dict[str, str]:
    """Compare every tensor of the destination, as its own reader has it, with the source, bit by bit, and the source
    with the digests that are known of it. SHA-256 of the destination's, by name. Every rank must call.

    Raises CheckpointError, on every rank, that names the first tensor that differs.
    """
    names, digests = list(shapes(source.arch)), dict[str, str]()

    def share() -> None:
        for count, name in enumerate(names):
            if count % mesh.world.size != mesh.world.rank:
                continue
            wanted = source.weights.read(name)
            if name in known and digest(wanted) != known[name]:
                raise CheckpointError(
                    f"{source.path}: {name} is not what was written there (its SHA-256 differs from the conversion "
                    "report's): it was damaged, shuffled or changed; convert it again from its own source"
                )
            wanted, found = wanted.to(dtypes[name]), target.read(name)
            if found.dtype != wanted.dtype or not torch.equal(_bits(found), _bits(wanted)):
                raise CheckpointError(
                    f"{name} came out otherwise than it went in ({_difference(wanted, found)}); nothing was published: "
                    "this is a defect, of the disk or of this program"
                )
            digests[name] = digest(found)
            tick(count + 1, len(names))

    target.check()
    together(mesh, share)
    everyone = collectives.gather_objects(digests, mesh.world.group)
    merged = {name: value for part in everyone for name, value in part.items()}
    return {name: merged[name] for name in names}


def together(mesh: Mesh, action: Callable[[], Any]) -> Any:
    """Do it on every rank; where it fails on one, every rank raises that rank's error, and none is left waiting.

    A disk that fails is a RunDirectoryError.
    """
    failure: GrpoMegaError | None = None
    result = None
    try:
        result = action()
    except GrpoMegaError as error:
        failure = error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        failure = RunDirectoryError(f"writing failed ({reason}); nothing was published: make room and start again")
    for other in collectives.gather_objects(failure, mesh.world.group):
        if other is not None:
            raise other
    return result


def _nothing() -> None:
    """For the ranks that have no part in it."""


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)  # a nan is itself, and 0.0 is not -0.0


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{tuple(wanted.shape)} {wanted.dtype}, found {tuple(found.shape)} {found.dtype}"
    count = int((_bits(found.float()) != _bits(wanted.float())).sum())
    return f"{count} bytes of {wanted.numel()} numbers differ"
