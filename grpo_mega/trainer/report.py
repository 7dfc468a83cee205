"""What a person reads when a run ends."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

from grpo_mega.trainer.setup import Run
from grpo_mega.types import Group

PROBLEMS = 3
PHASES = ("sample", "reward", "log-probs", "update")


def median_seconds(timings: Path) -> dict[str, float]:
    """Medians over the recorded steps of each phase and their sum ("step"), seconds; the largest peak memory, GiB."""
    rows = [json.loads(line) for line in timings.read_text().splitlines()]
    seconds = {phase: [row[f"{phase}_s"] for row in rows] for phase in PHASES}
    result = {phase: statistics.median(values) for phase, values in seconds.items()}
    result["step"] = statistics.median(sum(values) for values in zip(*seconds.values(), strict=True))
    result["memory"] = max(row["peak_memory_bytes_a_rank"] for row in rows) / 2**30
    return result


def report(
    run: Run, start: int, before: tuple[float, list[Group]] | None, after: tuple[float, list[Group]] | None
) -> None:
    """What the run was for: completions and accuracy before and after, its cost, where the model is, what to try next.

    before, after: mean reward and groups on the held-out problems after `start` steps and at the end.
    """
    say, directory, steps = run.progress.say, run.inputs.directory, run.recipe.run.num_steps
    if before is not None and after is not None:
        say("")
        for old, new in list(zip(before[1], after[1], strict=True))[:PROBLEMS]:
            say(f"  problem  {_one_line(old.prompt.text)}   (answer {old.prompt.answer})")
            for name, group in (("before", old), ("after ", new)):
                first = group.rollouts[0]
                say(f"  {name}   {_one_line(first.completion.text)}   [{first.reward:g}]")
            say("")
        say(f"held-out accuracy: {before[0]:.3f} after {start} steps, {after[0]:.3f} after {steps}")
    if run.mesh.is_writer:
        median = median_seconds(directory.path / "timings.jsonl")
        say(
            f"seconds a step (medians): {median['step']:.1f}, of them sampling {median['sample']:.1f}, log-probs "
            f"{median['log-probs']:.1f}, update {median['update']:.1f}; peak memory a rank {median['memory']:.2f} GiB"
        )
    say(f"records: {directory.path}/ (metrics.jsonl, timings.jsonl, evaluations.jsonl, rollouts/)")
    say(f"trained model (a Hugging Face folder): {directory.hf}")
    say(f"next: {how_to_go_on(run)}   (goes on from the checkpoint)")


def how_to_go_on(run: Run) -> str:
    """A command that trains the same run for twice as many steps."""
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    recipe, steps = run.inputs.directory.path / "recipe.yaml", 2 * run.recipe.run.num_steps
    return f"{python} -m grpo_mega train {recipe} --run.num_steps {steps}"


def _one_line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
