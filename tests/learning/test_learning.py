"""A tiny model learns by the real path, sharded either way; and not once the sign, the shift or the mask is broken.

By demonstrations, and by its own best completions, it learns the same task.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from two_kinds import BAR, START, WINDOW, ends, make_task

from grpo_mega.config import validate_recipe
from grpo_mega.parallel import mesh
from grpo_mega.trainer import loop
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import build_run, read_inputs

STEPS = 30


def flip_sign(batch):
    return replace(batch, advantages=-batch.advantages)


def unshift(batch):
    """A row is trained on the token it reads, not on the one it predicts."""
    return replace(batch, targets=batch.input_ids)


def late_mask(batch):
    """The mask of the unshifted tokens: a completion's first token is left out, the row behind its last one trained."""
    return replace(batch, loss_weights=batch.loss_weights.roll(1), advantages=batch.advantages.roll(1))


def prompt_mask(batch):
    """Prompt tokens are trained on, with the advantage of the completion that follows."""
    weights, advantages = batch.loss_weights.tolist(), batch.advantages.tolist()
    following = 0.0
    for row in reversed(range(batch.rows)):
        if weights[row]:
            weights[row], following = 0.0, advantages[row]
        elif batch.segment_ids[row] >= 0:
            weights[row], advantages[row] = 1.0, following
    changed = torch.tensor(weights), torch.tensor(advantages)
    return replace(batch, loss_weights=changed[0] * batch.loss_weights.sum() / changed[0].sum(), advantages=changed[1])


def learn(tree, break_it=None):
    """Train as the recipe says on every rank; metrics.jsonl, and the rewards on what is held out, before and after."""
    recipe = validate_recipe(tree)
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(recipe.parallel.tensor, recipe.parallel.pipeline)
    run = build_run(recipe, inputs, grid, Progress(None))
    if grid.is_writer:
        inputs.directory.open(1)
    real = loop.minibatches

    def minibatches(*args):
        parts = real(*args)
        return parts if break_it is None else [[break_it(batch) for batch in part] for part in parts]

    with mock.patch.object(loop, "minibatches", minibatches), mock.patch.object(loop, "save"):
        before = loop.evaluate(run, 0).estimates["reward"].mean if inputs.heldout else None
        loop.train(run)
        after = loop.evaluate(run, STEPS).estimates["reward"].mean if inputs.heldout else None
    if grid.is_writer:
        lines = (inputs.directory.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], before, after


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and data, as the recipe's sections that name them."""
    return make_task(tmp_path_factory.mktemp("learning"))


@pytest.fixture
def recipe(inputs, tmp_path):
    def make(**parallel):
        return inputs | {
            "parallel": parallel,
            "reward": {"function": "two_kinds:two_kinds"},
            "sampling": {"max_completion_tokens": 2},
            "grpo": {"group_size": 16, "kl_coef": 0.001},
            "batch": {"prompts_per_step": 8, "tokens_per_microbatch": 512},
            "optimizer": {"lr": 0.01, "beta2": 0.99},
            "run": {"directory": str(tmp_path / "-".join(parallel)), "num_steps": STEPS, "seed": 1},
        }

    return make


def test_reward_rises_alike_at_tensor_2_and_pipeline_2(ranks, recipe):
    runs = {axis: ranks(2, learn, recipe(**{axis: 2}), timeout=120)[0][0] for axis in ("tensor", "pipeline")}
    for axis, metrics in runs.items():
        first, last = ends(metrics)
        assert first < START and last > BAR, f"{axis}: {first:.3f} -> {last:.3f}"
    for tensor, pipeline in zip(runs["tensor"][:WINDOW], runs["pipeline"], strict=False):
        assert tensor["reward"] == pipeline["reward"]
        assert tensor["loss"] == pytest.approx(pipeline["loss"], abs=1e-5)


@pytest.mark.parametrize("break_it", [flip_sign, unshift, late_mask, prompt_mask])
def test_no_learning_once_broken(ranks, recipe, break_it):
    first, last = ends(ranks(2, learn, recipe(pipeline=2), break_it, timeout=120)[0][0])
    assert first < START and last < START, f"{first:.3f} -> {last:.3f}"


@pytest.mark.parametrize("break_it", [None, flip_sign])
def test_its_own_best_completions_teach_the_policy(ranks, recipe, break_it):
    """Rejection-sampling fine-tuning: of sixteen completions the best is imitated."""
    tree = recipe(pipeline=2) | {"preset": "rft", "grpo": {"group_size": 16}}
    tree["run"] = tree["run"] | {"num_steps": 40}
    first, last = ends(ranks(2, learn, tree, break_it, timeout=120)[0][0])
    assert first < START and (last < START if break_it else last > BAR), f"{first:.3f} -> {last:.3f}"


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


@pytest.mark.parametrize("break_it", [None, flip_sign])
def test_demonstrations_teach_the_policy_what_it_samples_for_other_prompts(ranks, recipe, tmp_path, break_it):
    """A cold start by fine-tuning on rows of {prompt, completion}, a character of each kind in the order asked for."""
    template, data = tmp_path / "turns.jinja", tmp_path / "shown.jsonl"
    template.write_text(TURNS)
    rows = [
        {"prompt": letter + "x" * n, "completion": shown, "answer": answer}
        for n in range(16)
        for letter, answer, shown in (("a", "ascii first", f"{n % 10}é"), ("b", "ascii last", f"é{n % 10}"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = recipe(pipeline=2) | {
        "preset": "sft",
        "data": {
            "jsonl": str(data), "heldout": 8, "completion_field": "completion", "chat_template": str(template)
        },
        "sampling": {"max_completion_tokens": 4},
        "grpo": {},
        "evaluation": {"completions": 16},
    }  # fmt: skip
    metrics, first, last = ranks(2, learn, tree, break_it, timeout=120)[0]
    assert first < START and (last < START if break_it else last > BAR), f"{first:.3f} -> {last:.3f}"
    assert "reward" not in metrics[0] and (break_it or metrics[-1]["loss"] < metrics[0]["loss"] / 2)
