"""Writing and reading back: tensor by tensor, each process its share, whatever the two formats are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
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
    """A destination under its temporary name. rows: of its vocabulary, padding included; unsaid: what only config.json
    beside it says of the model."""

    partial: Path
    rows: int
    unsaid: list[str]

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
        self.source, self.dtypes, self.rows, self.unsaid = source, dtypes, source.arch.vocab_size, list[str]()
        self.writer: Writer = _begun(mesh, partial(Writer, source.arch, options.destination, dtypes))
        self.partial, self.publish = self.writer.partial, self.writer.publish

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
        on_writer(mesh, self.writer.finish)


class MegatronTarget:
    """A distributed checkpoint of Megatron's."""

    def __init__(self, source: Source, options: Options, dtypes: Mapping[str, torch.dtype], mesh: Mesh):
        axes = options.parallel
        layout = Layout(axes.tensor, axes.pipeline, axes.expert, axes.expert_tensor)
        make = partial(
            TorchDistWriter,
            source,
            options.destination,
            layout,
            dtypes,
            transformer_engine_names=options.names == "te",
        )
        self.writer: TorchDistWriter = _begun(mesh, make)
        self.partial, self.publish = self.writer.partial, self.writer.publish
        self.rows, self.unsaid = self.writer.rows, list(self.writer.unsaid)

    def write(self, mesh: Mesh, tick: Tick) -> None:
        mine = together(mesh, lambda: self.writer.write(mesh.world.rank, mesh.world.size, tick))
        everyone = collectives.gather_objects(mine, mesh.world.group)
        on_writer(mesh, lambda: self.writer.finish(everyone))


def _begun(mesh: Mesh, make: Callable[..., Any]) -> Any:
    """A format's writer on every rank: the writing rank's first, which makes the folder."""
    return on_writer(mesh, partial(make, begins=True)) or make(begins=False)


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


def on_writer(mesh: Mesh, action: Callable[[], Any]) -> Any:
    """The same of one rank's work; None on the others."""
    return together(mesh, action if mesh.is_writer else lambda: None)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)  # a nan is itself, and 0.0 is not -0.0


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{tuple(wanted.shape)} {wanted.dtype}, found {tuple(found.shape)} {found.dtype}"
    count = int((_bits(found.float()) != _bits(wanted.float())).sum())
    return f"{count} bytes of {wanted.numel()} numbers differ"
