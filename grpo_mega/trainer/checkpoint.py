"""Checkpoints by megatron's dist_checkpointing: sharded, any layout can load another's, published by one rename."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from grpo_mega.errors import CheckpointError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.formats.hugging_face import write_companions
from grpo_mega.model.specs import TrunkModel
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.trainer.policy import Policy
from grpo_mega.trainer.records import raise_together, unwritable, write_together, writing

# What is not sharded megatron-core 0.16.1 keeps in common.pt, 0.19.2 in a shard (dist_checkpointing/serialization.py).
_COMMON = ("common.pt",) if hasattr(CheckpointingConfig, "common_backend") else ()
_FILES = ("trainer.json", *_COMMON, "metadata.json", ".metadata")  # beside the shards, *.distcp
# the distributed optimizer's states as tensors of the parameters' shapes: the one form that any layout can load
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def latest(directory: Path) -> Path | None:
    """The newest finished checkpoint, or None. Raises CheckpointError if `latest` names one that is not there."""
    pointer = directory / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    missing = [file for file in _FILES if not (directory / name / file).is_file()]
    if missing:
        found = f"lacks {missing[0]}" if name and (directory / name).is_dir() else "is not there"
        others = sorted(step.parent.name for step in directory.glob("step_*/trainer.json") if step.parent.name != name)
        remedy = f"write {' or '.join(others)} in it" if others else "delete it to begin at step 0"
        if missing == [*_COMMON] and "common_backend" not in (directory / name / "metadata.json").read_text():
            found, remedy = "a newer megatron-core wrote", f"go on with that one (Python 3.12), or {remedy}"
        raise CheckpointError(f"{pointer} names the checkpoint {name!r}, which {found}; {remedy}")
    return directory / name


def latest_together(directory: Path, mesh: Mesh) -> Path | None:
    """`latest` as the writing rank finds it, on every rank: all must go on from the same step, or none.

    Every rank must call, and raises what the writer would.
    """
    mine = failure = None
    if mesh.is_writer:
        try:
            mine = latest(directory)
        except CheckpointError as error:
            failure = error
    raise_together(mesh, failure)
    return collectives.broadcast_object(mine, mesh.world.group)


def save(directory: Path, step: int, policy: Policy, state: dict[str, Any], mesh: Mesh, arch: Architecture) -> Path:
    """Write `directory/step_N` aside, then publish it and move `latest`. Every rank must call.

    state: what the trainer needs besides weights and optimizer; plain JSON. config.json and the tokenizer's files go
    beside the shards, so that a checkpoint can be converted, or be a run's model, by itself.
    Raises RunDirectoryError if it cannot be written: `latest` then names what it named before.
    """
    final = directory / f"step_{step}"
    partial = directory / f"step_{step}.partial"

    def begin() -> None:
        with writing(directory):
            for stale in (partial, final):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)

    def publish() -> None:
        with writing(directory):
            (partial / "trainer.json").write_text(json.dumps({**state, "scheduler": policy.scheduler.state_dict()}))
            write_companions(arch, partial, str(policy.model.config.params_dtype).removeprefix("torch."))
            partial.rename(final)
            pointer = directory / "latest.partial"
            pointer.write_text(final.name + "\n")
            pointer.replace(directory / "latest")

    write_together(mesh, begin)
    try:
        _save_shards(partial, policy, mesh)
    finally:
        # megatron keeps a manager's process from here to the interpreter's end, which a rank that fails later does not
        # reach: the orphan would hold the terminal's pipes (dist_checkpointing/strategies/filesystem_async.py)
        filesystem_async._results_queue = None
    dist.barrier()
    write_together(mesh, publish)
    return final


def _save_shards(partial: Path, policy: Policy, mesh: Mesh) -> None:
    state = _sharded(policy, loading=False)
    try:
        dist_checkpointing.save(state, str(partial))
    except (CheckpointException, OSError, RuntimeError) as error:
        everywhere = isinstance(error, CheckpointException)  # then the causes are with the writer
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        causes = [cause for cause, _ in failures.values()]
        reason = next(filter(None, map(_unwritten, causes)), None)
        failure = None if reason is None else unwritable(partial.parent, reason)
        if mesh.is_writer:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        if everywhere:
            raise_together(mesh, failure)
        if failure is not None:  # common.pt, which the writer writes alone: the others wait, and are ended with it
            raise failure from error
        raise


def _unwritten(error: BaseException) -> str | None:
    """Why a file could not be written; None if the error is about something else."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) or "[Errno " in text:  # megatron's writing process passes its error on as text
        return text.rpartition("] ")[2]
    if "starting worker" in text:  # 0.19.2 (filesystem_async.py) passes on the error's kind and logs its words
        return "megatron's line 'Local worker ... encountered an error' has the reason"
    torchs = (
        "inline_container",
        "iostream error",
        "PytorchStreamWriter",
    )  # its words for a file that it could not finish
    return "torch could not write a whole file" if any(words in text for words in torchs) else None


def load(checkpoint: Path, policy: Policy) -> dict[str, Any]:
    """Fill the policy's weights, optimizer and schedule; returns the trainer's state. Every rank must call.

    Raises CheckpointError for one that is damaged or belongs to another model.
    """
    try:
        state = json.loads((checkpoint / "trainer.json").read_text())
        scheduler = state.pop("scheduler")
        loaded = dist_checkpointing.load(_sharded(policy, loading=True), str(checkpoint))
        for name, part in _parts(policy):
            part.load_state_dict(loaded[name])
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(scheduler)
    except (Exception, CheckpointException) as error:  # damage raises whatever its reader does; torch's is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = " ".join(str(cause).split())[:200]
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged or of another model ({type(cause).__name__}: {reason}); name another "
            f"one in {checkpoint.parent / 'latest'}"
        ) from error
    return state


def _sharded(policy: Policy, *, loading: bool) -> dict[str, Any]:
    if not loading:
        policy.settled()
    metadata = dict(_METADATA)  # megatron writes this mesh's data-parallel group into it
    model = {name: part.sharded_state_dict(metadata=metadata) for name, part in _parts(policy)}
    return {
        **model,
        "optimizer": policy.optimizer.sharded_state_dict(
            model if len(model) > 1 else model["model"], is_loading=loading, metadata=metadata
        ),
    }


def _parts(policy: Policy) -> list[tuple[str, TrunkModel]]:
    """The model's parts under the names that megatron gives them: tensors are known by their layer, not by these."""
    parts = list(policy.model)
    return [("model" if len(parts) == 1 else f"model{n}", part) for n, part in enumerate(parts)]
