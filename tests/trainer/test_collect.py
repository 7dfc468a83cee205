"""The step's groups: DAPO's dynamic sampling by hand, on a sampler and rewards that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grpo_mega.config import validate_recipe
from grpo_mega.data.mixture import PromptStream
from grpo_mega.parallel.mesh import Axis
from grpo_mega.rewards.resolve import Part
from grpo_mega.trainer.collect import collect
from grpo_mega.trainer.policy import silent
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.scoring import Scoring
from grpo_mega.types import Completion, Prompt


class Directory:
    def __init__(self):
        self.written = []

    def write_rollouts(self, step, groups):
        self.written.append((step, [group.prompt.index for group in groups], groups))


def run_of(max_resamples, useful, **grpo):
    """Two prompts a step; prompts of the `useful` indices get unequal rewards, the others equal ones."""
    recipe = validate_recipe(
        {
            "model": {"path": "unused"},
            "data": {"jsonl": "unused"},
            "grpo": {"group_size": 2, "kl_coef": 0.0, "max_resamples": max_resamples} | grpo,
            "batch": {"prompts_per_step": 2},
            "run": {"directory": "unused"},
        }
    )
    alone, sampled = Axis(None, 0, 1), []

    def sample(prompts, mine, size, step):
        sampled.append(([prompt.index for prompt in prompts], step))
        return [[Completion((prompt.index, i), (0.0, 0.0), "stop", f"{prompt.index}:{i}") for i in range(size)]
                for prompt in prompts]  # fmt: skip

    def reward(text, answer, row):
        index, number = map(int, text.split(":"))
        return float(number) if index in useful else 1.0

    mesh = SimpleNamespace(
        share=range, leads_replica=True, is_writer=True, replica=alone, context=alone, data=alone, world=alone,
        device=torch.device("cpu"),
    )  # fmt: skip
    prompts = PromptStream([[Prompt(0, f"p{n}", (n,)) for n in range(3)]], seed=0)
    inputs = SimpleNamespace(prompts=prompts, directory=Directory())
    parts = (Part("own", 1.0, reward),)
    scoring = Scoring(recipe.reward, parts, models={}, decode=str, mesh=mesh, tick=silent)
    run = SimpleNamespace(
        recipe=recipe, mesh=mesh, inputs=inputs, progress=Progress(None), sampler=SimpleNamespace(sample=sample),
        scoring=scoring,
    )  # fmt: skip
    run.progress.begin_step(5, 9)
    return run, sampled


def indices(groups):
    return [group.prompt.index for group in groups]


@pytest.mark.parametrize(
    ("max_resamples", "useful", "trained", "rounds"),
    [
        (0, {1}, [0, 1], 1),  # equal groups are kept, and teach nothing
        (3, {0, 1}, [0, 1], 1),  # the first round does
        (3, {1, 2, 3}, [1, 2], 2),  # one more round; what is beyond the step's size is dropped
        (3, {1, 5}, [1, 5], 3),
        (2, {1}, [0, 1], 3),  # the bound: filled up with the first of the equal ones
        (1, set(), [0, 1], 2),
    ],
)
def test_rounds_go_on_until_the_step_is_full(max_resamples, useful, trained, rounds):
    run, sampled = run_of(max_resamples, useful)
    found = collect(run, 4)
    asked = list(range(2 * rounds))
    assert sampled == [([2 * n, 2 * n + 1], 4) for n in range(rounds)]
    assert indices(found.trained) == trained and indices(found.sampled) == asked
    assert run.inputs.prompts.state()["cursor"] == 2 * rounds
    ((step, written, groups),) = run.inputs.directory.written
    assert (step, written) == (5, asked)
    for group in groups:  # what the file says of each
        advantages = [rollout.advantage for rollout in group.rollouts]
        if group.prompt.index not in trained:
            assert advantages == [None, None]
        elif group.prompt.index in useful:
            assert advantages == pytest.approx([-1, 1], abs=1e-5)
        else:
            assert advantages == [0, 0]
