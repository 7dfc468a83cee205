"""One rank's whole run: read, check, join, build, resume, train, export, report."""

from __future__ import annotations

from contextlib import closing

from grpo_mega.config import Recipe
from grpo_mega.data.tokenizer import export_tokenizer
from grpo_mega.errors import RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer import checkpoint, loop
from grpo_mega.trainer.evaluation import evaluate
from grpo_mega.trainer.iterations import restore_reference
from grpo_mega.trainer.progress import Progress, progress_on
from grpo_mega.trainer.records import raise_together, write_together, writing
from grpo_mega.trainer.report import how_to_go_on, report
from grpo_mega.trainer.reward_replay import restore_reward_models
from grpo_mega.trainer.setup import Inputs, Run, build_run, read_inputs


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Every rank calls; raises GrpoMegaError for what a user can put right."""
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(**recipe.parallel.sizes)
    progress = progress_on(speaks=grid.is_writer)
    progress.watch()
    with closing(progress), closing(inputs.directory):
        _train(recipe, inputs, grid, progress)
    mesh.shutdown()


def _train(recipe: Recipe, inputs: Inputs, grid: mesh.Mesh, progress: Progress) -> None:
    progress.say(describe(recipe.model.path, grid, inputs.layers, recipe.precision.dtype))
    for line in inputs.data.lines():
        progress.say(line)
    with progress.task("loading weights"):
        run = build_run(recipe, inputs, grid, progress)
    start = resume(run)
    if start >= recipe.run.num_steps:
        if collectives.broadcast_object(not inputs.directory.hf.exists(), grid.world.group):
            export(run)  # the run was ended between its last checkpoint and this
        progress.say(f"all {recipe.run.num_steps} steps are done, the model is in {inputs.directory.hf}")
        progress.say(f"next: {how_to_go_on(run)}, or another run.directory")
        return
    write_together(grid, lambda: inputs.directory.open(start + 1))
    before = evaluate(run, start) if inputs.heldout else None
    loop.train(run, start)
    after = evaluate(run, recipe.run.num_steps) if inputs.heldout else None
    export(run)
    report(run, start, before, after)


def export(run: Run) -> None:
    """Write the policy as a Hugging Face folder. Every rank must call."""
    inputs, failure, tick = run.inputs, None, run.progress.tick
    with run.progress.task(f"writing {inputs.directory.hf}"):
        try:
            bridge.export(run.policy.settled(), inputs.arch, run.mesh, inputs.layers, inputs.directory.hf, tick)
            if run.mesh.is_writer:
                with writing(inputs.directory.hf):
                    export_tokenizer(inputs.directory.hf, run.recipe.model.tokenizer, run.recipe.data.chat_template)
        except RunDirectoryError as error:
            failure = error
        raise_together(run.mesh, failure)


def resume(run: Run) -> int:
    """Load the run directory's latest checkpoint, if any; the number of steps already done."""
    found = checkpoint.latest_together(run.inputs.directory.checkpoints, run.mesh)
    if found is None:
        return 0
    state = checkpoint.load(found, run.policy)
    run.inputs.prompts.restore(state["prompts"])
    run.objective.restore(state.get("objective", {}))
    restore_reference(run, state["step"])
    restore_reward_models(run, state["step"])
    run.progress.say(f"resuming from {found}: {state['step']} of {run.recipe.run.num_steps} steps are done")
    return state["step"]


def describe(model: str, grid: mesh.Mesh, layers: tuple[int, ...], dtype: str) -> str:
    """The model and the layout that it runs under, on one line."""
    stages = f" (layers {'+'.join(map(str, layers))})" if len(layers) > 1 else ""
    virtual = f" x virtual {grid.virtual}" if grid.virtual > 1 else ""
    context = f" x context {grid.context.size}" if grid.context.size > 1 else ""
    slices = f" x expert tensor {grid.expert_tensor.size}" if grid.expert_tensor.size != grid.tensor.size else ""
    experts = f" (experts: {grid.expert.size}{slices})" if slices or grid.expert.size > 1 else ""
    return (
        f"grpo_mega: {model} on {grid.world.size} ranks: tensor {grid.tensor.size} x pipeline "
        f"{grid.pipeline.size}{virtual}{stages}{context} x data {grid.data.size}{experts}, "
        f"{grid.device.type} {dtype}"
    )
