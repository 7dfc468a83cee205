"""One rank's whole run: read, check, join, build, resume, train, export, report."""

from __future__ import annotations

from grpo_mega.config import Recipe
from grpo_mega.data.tokenizer import export_tokenizer
from grpo_mega.model import bridge
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer import checkpoint, loop
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.report import how_to_go_on, report
from grpo_mega.trainer.setup import Run, build_run, read_inputs


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Every rank calls; raises GrpoMegaError for what a user can put right."""
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(recipe.parallel.tensor, recipe.parallel.pipeline)
    progress = Progress(grid.is_writer)
    progress.say(describe(recipe, grid, inputs.layers))
    for line in inputs.data.lines():
        progress.say(line)
    with progress.phase_line("loading weights"):
        run = build_run(recipe, inputs, grid, progress)
    start = resume(run)
    if start >= recipe.run.num_steps:
        if collectives.broadcast_object(not inputs.directory.hf.exists(), grid.world.group):
            export(run)  # the run was ended between its last checkpoint and this
        progress.say(f"all {recipe.run.num_steps} steps are done, the model is in {inputs.directory.hf}")
        progress.say(f"next: {how_to_go_on(run)}, or another run.directory")
        return mesh.shutdown()
    if grid.is_writer:
        inputs.directory.open(start + 1)
    before = loop.evaluate(run, start) if inputs.heldout else None
    loop.train(run, start)
    after = loop.evaluate(run, recipe.run.num_steps) if inputs.heldout else None
    export(run)
    report(run, start, before, after)
    mesh.shutdown()


def export(run: Run) -> None:
    """Write the policy as a Hugging Face folder, from the first replica's ranks."""
    inputs = run.inputs
    if run.mesh.data.first:
        with run.progress.phase_line(f"writing {inputs.directory.hf}"):
            bridge.export(run.policy.model, inputs.arch, run.mesh, inputs.layers, inputs.directory.hf)
            if run.mesh.is_writer:
                export_tokenizer(inputs.directory.hf, run.recipe.model.tokenizer, run.recipe.data.chat_template)


def resume(run: Run) -> int:
    """Load the run directory's latest checkpoint, if any; the number of steps already done."""
    # the writer decides: every rank must go on from the same step, or none
    mine = checkpoint.latest(run.inputs.directory.checkpoints) if run.mesh.is_writer else None
    found = collectives.broadcast_object(mine, run.mesh.world.group)
    if found is None:
        return 0
    state = checkpoint.load(found, run.policy)
    run.inputs.prompts.restore(state["prompts"])
    run.progress.say(f"resuming from {found}: {state['step']} of {run.recipe.run.num_steps} steps are done")
    return state["step"]


def describe(recipe: Recipe, grid: mesh.Mesh, layers: tuple[int, ...]) -> str:
    stages = f" (layers {'+'.join(map(str, layers))})" if len(layers) > 1 else ""
    return (
        f"grpo_mega: {recipe.model.path} on {grid.world.size} ranks: tensor {grid.tensor.size} x pipeline "
        f"{grid.pipeline.size}{stages} x data {grid.data.size}, {grid.device.type} {recipe.precision.dtype}"
    )
