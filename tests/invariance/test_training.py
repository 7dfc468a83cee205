"""Ten steps of training are the same ten steps under any layout: prompts, completions, losses, in float32.

Each run is the whole loop over the same recipe but for its `parallel` section (and what else only says where numbers
live); what it has written is laid beside what one process wrote.
"""

from __future__ import annotations

import json

import pyarrow.parquet as parquet
import pytest
import ranks as pool
import tiny

from grpo_mega.config import validate_recipe
from grpo_mega.parallel import mesh
from grpo_mega.trainer import loop
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import build_run, read_inputs

STEPS = 10
DRAWN = ["prompt", "token_ids", "finish_reason", "reward"]
LAYOUTS = {  # parallel; other sections
    "tensor 2": ({"tensor": 2, "sequence": True}, {}),
    "interleaved": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "context 2": ({"context": 2}, {}),
    "data 2": ({"overlap": True}, {"optimizer": {"distributed": True}, "batch": {"tokens_per_microbatch": 24}}),
}


def word(text, answer, row):
    """A reward that is easily learnt: how many letters are among the first of the alphabet."""
    return sum(letter < "p" for letter in text) / 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    shape = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(folder / "model", num_key_value_heads=2, **shape)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 8)))
    return {
        "model": {"path": str(model)},
        "data": {"jsonl": str(data), "heldout": 0},
        "reward": {"function": f"{__name__}:word", "truncated": "mask"},
        "sampling": {"max_completion_tokens": 8, "stop_token_ids": list(range(0, 256, 6))},
        "grpo": {"group_size": 4, "kl_coef": 0.05, "num_iterations": 2},
        "batch": {"prompts_per_step": 6, "minibatches": 2},
        # an eps so large that an update is no mere sign of a gradient which rounding may turn
        "optimizer": {"lr": 0.05, "eps": 0.3},
    }


def trained(tree):
    recipe = validate_recipe(tree)
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    run = build_run(recipe, inputs, mesh.initialize(**recipe.parallel.sizes), Progress(None))
    if run.mesh.is_writer:
        inputs.directory.open(1)
    loop.train(run)


def written(tree, directory, world, parallel, more):
    """(metrics of each step, completions of each step) of a run that is made for it."""
    settings = {name: section | more.get(name, {}) for name, section in tree.items()}
    settings |= {"parallel": parallel, "run": {"directory": str(directory), "num_steps": STEPS}}
    pool.ranks(world, trained, settings, timeout=200)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    files = sorted((directory / "rollouts").glob("*"))
    return metrics, [parquet.read_table(file, columns=DRAWN).to_pylist() for file in files]


@pytest.fixture(scope="module")
def alone(tree, tmp_path_factory):
    return written(tree, tmp_path_factory.mktemp("alone") / "run", 1, {}, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_steps_are_the_same_ten_steps(tree, alone, tmp_path, name):
    metrics, rollouts = written(tree, tmp_path / "run", 2, *LAYOUTS[name])
    expected, completions = alone
    assert len(metrics) == len(expected) == STEPS and len(rollouts) == STEPS
    near = sum(step["near_boundary_draws"] for step in expected)
    assert rollouts == completions, f"completions differ; {near} draws were near a boundary"
    for found, wanted in zip(metrics, expected, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert expected[-1]["reward"] > expected[0]["reward"], "it is to learn something"
