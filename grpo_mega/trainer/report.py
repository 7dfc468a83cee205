"""What a person reads when a run ends."""

from __future__ import annotations

import os
import sys

from grpo_mega.trainer.evaluation import Evaluation
from grpo_mega.trainer.lines import bracketed, one_line, read_lines
from grpo_mega.trainer.setup import Run
from grpo_mega.trainer.summary import costs

PROBLEMS = 3


def report(run: Run, start: int, before: Evaluation | None, after: Evaluation | None) -> None:
    """What the run was for: completions and accuracy before and after, its cost, where the model is, what to try next.

    before, after: of the held-out problems, after `start` steps and at the end.
    """
    say, directory, steps = run.progress.say, run.inputs.directory, run.recipe.run.num_steps
    if before is not None and after is not None:
        say("")
        for old, new in list(zip(before.groups, after.groups, strict=True))[:PROBLEMS]:
            say(f"  problem  {one_line(old.prompt.text)}   (answer {old.prompt.answer})")
            for name, group in (("before", old), ("after ", new)):
                first = group.rollouts[0]
                say(f"  {name}   {one_line(first.completion.text)}   [{first.reward:g}]")
            say("")
        for name, earlier in before.headlines().items():
            then, now = (bracketed(of.mean, of.low, of.high) for of in (earlier, after.estimates[name]))
            say(f"held-out {name}: {then} after {start} steps, {now} after {steps}")
        say("(of {problems} problems x {completions} completions; in brackets 95 % intervals)".format(**after.counts))
    if run.mesh.is_writer:
        for line in costs(read_lines(directory.path / "timings.jsonl")[0]):
            say(line)
    say(f"records: {directory.path}/; to see them:")
    say(f"  grpo-mega report {directory.path}")
    say(f"  tensorboard --logdir {directory.path / 'tensorboard'}")
    say(f"trained model (a Hugging Face folder): {directory.hf}")
    say(f"next: {how_to_go_on(run)}   (goes on from the checkpoint)")


def how_to_go_on(run: Run) -> str:
    """A command that trains the same run for twice as many steps."""
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    recipe, steps = run.inputs.directory.path / "recipe.yaml", 2 * run.recipe.run.num_steps
    return f"{python} -m grpo_mega train {recipe} --run.num_steps {steps}"
