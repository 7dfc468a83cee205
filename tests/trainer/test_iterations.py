"""Iterative GRPO: the reference is the policy of the last outer iteration's start, resumed and under another layout.

The runs have everything that a step's start depends on: a refreshed reference, an entropy coefficient that follows its
target, process supervision, and prompts that dynamic sampling takes in uneven numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks as pool
import tiny

from grpo_mega.config import validate_recipe
from grpo_mega.errors import CheckpointError, ConfigError
from grpo_mega.trainer import main
from grpo_mega.trainer.check import check_cheaply

EVERY, STEPS = 2, 5


def per_step(steps, answer, row):
    """How many letters of a step are from the first half of the alphabet."""
    return [sum(letter < "n" for letter in step) / 8 for step in steps]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iterations")
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(folder / "model", num_key_value_heads=2, head_dim=4, **shape)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 8)))
    return {
        "model": {"path": str(model)},
        "data": {"jsonl": str(data), "heldout": 0},
        "reward": {"function": f"{__name__}:per_step", "steps": {"delimiter": "e"}},
        "sampling": {"max_completion_tokens": 8, "stop_token_ids": list(range(0, 256, 6))},
        "grpo": {
            "group_size": 3, "kl_coef": 0.05, "max_resamples": 1, "entropy_target": 9.0, "entropy_delta": 0.001,
        },
        "reference": {"refresh_every": EVERY},
        "batch": {"prompts_per_step": 4},
        "optimizer": {"lr": 0.02, "eps": 0.3},
    }  # fmt: skip


def train(tree, directory, num_steps, **more):
    settings = tree | more
    settings["run"] = {"directory": str(directory), "num_steps": num_steps, "save_every": 3}
    try:
        main.train(validate_recipe(settings))
    except CheckpointError as error:
        return str(error)


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def references(directory):
    return sorted(path.name for path in (Path(directory) / "references").glob("*"))


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    pool.ranks(1, train, tree, directory, STEPS, timeout=120)
    return directory


def test_the_reference_is_the_policy_where_an_iteration_begins(whole):
    """In a step's one update the policy is what it was at the step's start: the KL is 0 there, and only there."""
    divergences = [line["kl"] for line in metrics(whole)]
    assert divergences[0] == divergences[2] == divergences[4] == 0.0  # the first reference is the first policy
    assert min(divergences[1], divergences[3]) > 1e-4
    assert references(whole) == ["step_2", "step_4"]  # of checkpoints 3 and 5
    assert [line["entropy_coef"] for line in metrics(whole)] == pytest.approx([0, 0.001, 0.002, 0.003, 0.004])
    assert sum(line["resampled_groups"] for line in metrics(whole)) > 0, "the case is to resample"


def test_a_run_resumed_within_an_iteration_is_the_run(tree, whole, tmp_path):
    pool.ranks(1, train, tree, tmp_path / "run", 3, timeout=120)
    assert references(tmp_path / "run") == ["step_2"]
    shutil.copytree(tmp_path / "run", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "references")
    pool.ranks(1, train, tree, tmp_path / "run", STEPS, timeout=120)
    assert metrics(tmp_path / "run") == metrics(whole)
    (sentence,) = pool.ranks(1, train, tree, tmp_path / "bare", STEPS, timeout=120)
    assert sentence.endswith(
        "references/step_2, the reference of steps 3 to 4, is not there; restore it, or go on from a checkpoint of 2 x "
        "k steps, which makes its own"
    )


def test_a_reference_of_another_layout_is_refreshed_too(tree, whole, tmp_path):
    other = {"parallel": {"pipeline": 2}, "reference": {"refresh_every": EVERY, "tensor": 2, "offload": True}}
    pool.ranks(2, train, tree | other, tmp_path / "run", STEPS, timeout=120)
    for found, expected in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_reference_of_another_shape_cannot_become_the_policy(tree, tmp_path):
    other = tiny.make_model(tmp_path / "other", num_hidden_layers=1, hidden_size=24)
    settings = tree | {"reference": {"refresh_every": 2, "path": str(other)}, "run": {"directory": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"reference\.refresh_every=2 makes the policy the reference, and"):
        check_cheaply(validate_recipe(settings), 1)
