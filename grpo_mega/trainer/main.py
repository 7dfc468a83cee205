"""One rank's whole run: read, check, join, build, resume, train, export, report."""

from __future__ import annotations

from grpo_mega.config import Recipe
from grpo_mega.model import bridge
from grpo_mega.parallel import device, mesh
from grpo_mega.trainer import checkpoint, loop
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import Run, build_run, read_inputs
from grpo_mega.types import Group

SHOWN = 3


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Every rank calls; raises GrpoMegaError for what a user can put right."""
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(recipe.parallel.tensor, recipe.parallel.pipeline)
    progress = Progress(grid.is_writer)
    progress.say(describe(recipe, grid, inputs.layers))
    with progress.phase_line("loading weights"):
        run = build_run(recipe, inputs, grid, progress)
    start = resume(run)
    if grid.is_writer:
        inputs.directory.open(start + 1)
    before = loop.evaluate(run, start) if inputs.heldout else None
    loop.train(run, start)
    after = loop.evaluate(run, recipe.run.num_steps) if inputs.heldout else None
    if grid.data.first:
        with progress.phase_line(f"writing {inputs.directory.hf}"):
            bridge.export(run.policy.model, inputs.arch, grid, inputs.layers, inputs.directory.hf)
    report(run, before, after)
    mesh.shutdown()


def resume(run: Run) -> int:
    """Load the run directory's latest checkpoint, if any; the number of steps already done."""
    found = checkpoint.latest(run.inputs.directory.checkpoints)
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


def report(run: Run, before: tuple[float, list[Group]] | None, after: tuple[float, list[Group]] | None) -> None:
    """What the run was for: accuracy and some completions before and after, where the model is, what to try next."""
    say = run.progress.say
    if before is not None and after is not None:
        say("")
        for old, new in list(zip(before[1], after[1], strict=True))[:SHOWN]:
            say(f"  problem  {_one_line(old.prompt.text)}   (answer {old.prompt.answer})")
            say(f"  before   {_one_line(old.rollouts[0].completion.text)}   [{old.rollouts[0].reward:g}]")
            say(f"  after    {_one_line(new.rollouts[0].completion.text)}   [{new.rollouts[0].reward:g}]\n")
        say(f"held-out accuracy: {before[0]:.3f} before, {after[0]:.3f} after {run.recipe.run.num_steps} steps")
    directory = run.inputs.directory
    say(f"peak memory: {device.peak_memory_bytes(run.mesh.device) / 2**30:.2f} GiB on rank 0")
    say(f"trained model (Hugging Face folder): {directory.hf}")
    say(f"records: {directory.path}/metrics.jsonl, timings.jsonl, rollouts/")
    more = run.recipe.run.num_steps * 2
    say(f"next: grpo-mega train {directory.path}/recipe.yaml --run.num_steps {more}   (goes on from the checkpoint)")


def _one_line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
