"""Iterative GRPO, DeepSeekMath, arXiv:2402.03300, algorithm 1: each outer iteration begins with pi_ref <- pi_theta."""

from __future__ import annotations

import shutil
from pathlib import Path

from grpo_mega.errors import CheckpointError, RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.trainer.records import raise_together, write_together, writing
from grpo_mega.trainer.setup import Run


def refresh_reference(run: Run, step: int) -> None:
    """Make the policy the reference where an outer iteration begins: before every `reference.refresh_every` steps.

    The policy is written as a Hugging Face folder, run.directory/references/step_N, and read from there, by whatever
    layout the reference has: a run that resumes in the middle of an iteration reads the same one. The first iteration's
    reference is the recipe's. Every rank must call. Raises RunDirectoryError, on every rank, if it cannot be written.
    """
    every = run.recipe.reference.refresh_every
    if run.reference is None or not every or step % every or step == 0:
        return
    folder, inputs = _folder(run, step), run.inputs
    with run.progress.task("refreshing the reference", f" after {step} steps"):

        def clear() -> None:
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended here

        write_together(run.mesh, clear)
        failure = None
        try:
            bridge.export(run.policy.settled(), inputs.arch, run.mesh, inputs.layers, folder)
        except RunDirectoryError as error:  # the writer's alone
            failure = error
        raise_together(run.mesh, failure)
        write_together(run.mesh, lambda: _forget(run, step))
        run.reference.load(folder, run.progress.tick)


def restore_reference(run: Run, step: int) -> None:
    """The reference of the iteration that a resumed run is in, `step` steps being done. Every rank must call.

    Raises CheckpointError if it is no longer there.
    """
    every = run.recipe.reference.refresh_every
    began = step // every * every if every else 0
    if run.reference is None or began == 0 or began == step:  # the first one; one that is about to be made
        return
    folder = _folder(run, began)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}, the reference of steps {began + 1} to {began + every}, is not there; restore it, or go on from "
            f"a checkpoint of {every} x k steps, which makes its own"
        )
    run.reference.load(folder, run.progress.tick)


def _folder(run: Run, step: int) -> Path:
    return run.inputs.directory.path / "references" / f"step_{step}"


def _forget(run: Run, step: int) -> None:
    """Delete the references that no checkpoint of the run would ask for."""
    every = run.recipe.reference.refresh_every
    saved = (path.name.removeprefix("step_") for path in run.inputs.directory.checkpoints.glob("step_*"))
    needed = {step, *(int(name) // every * every for name in saved if name.isdigit())}
    for folder in _folder(run, step).parent.glob("step_*"):
        if folder.name.removeprefix("step_").isdigit() and int(folder.name.removeprefix("step_")) not in needed:
            shutil.rmtree(folder, ignore_errors=True)
