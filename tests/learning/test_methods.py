"""Methods beside GRPO learn the task of `two_kinds`, each by its preset and the trainer's own loop."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import ranks as pool
from two_kinds import BAR, START, ends, make_task

from grpo_mega.config import validate_recipe
from grpo_mega.parallel import mesh
from grpo_mega.trainer import loop
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import build_run, read_inputs

METHODS = {
    # its published bounds leave only the first of a step's updates: test_learning's task needs the others
    "gspo": {"preset": "gspo", "grpo": {"clip_low": 0.2, "clip_high": 0.2}},
    "cispo": {"preset": "cispo"},
    "sapo": {"preset": "sapo"},
    # with a KL penalty in the reward; its own surrogate is for one update a step
    "rloo": {"preset": "rloo", "grpo": {"surrogate": "clip"}},
    "reinforce_plus_plus": {"preset": "reinforce_plus_plus"},  # in the return of each token
    "process supervision": {"reward": {"function": "two_kinds:each_byte", "steps": {"every_tokens": 1}}},
}


def learn(given, directory):
    """{method: metrics of each step}, from the writer; two updates a step."""
    grid, rewards = mesh.initialize(), {}
    for name, method in METHODS.items():
        tree = given | {
            "preset": method.get("preset"),
            "reward": method.get("reward", {"function": "two_kinds:two_kinds"}) | {"truncated": "reward"},
            "sampling": {"max_completion_tokens": 2},
            "grpo": {"group_size": 16, "num_iterations": 2} | method.get("grpo", {}),
            "batch": {"prompts_per_step": 8, "tokens_per_microbatch": 512},
            "optimizer": {"lr": 0.01, "beta2": 0.99},
            "run": {"directory": f"{directory}/{name}".replace(" ", "-"), "num_steps": 20, "seed": 1},
        }
        recipe = validate_recipe(tree)
        read = read_inputs(recipe, grid.world.size)
        run = build_run(recipe, read, grid, Progress(None))
        if grid.is_writer:
            read.directory.open(1)
        with mock.patch.object(loop, "save"):
            loop.train(run)
        if grid.is_writer:
            lines = (read.directory.path / "metrics.jsonl").read_text().splitlines()
            rewards[name] = [json.loads(line) for line in lines]
    return rewards


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return pool.ranks(2, learn, make_task(folder), str(folder), timeout=240)[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_reward_rises(learnt, name):
    first, last = ends(learnt[name])
    assert first < START and last > BAR, f"{first:.3f} -> {last:.3f}"
