"""What a run leaves behind, and what it takes back when steps are run again."""

from __future__ import annotations

import json

import pytest

from grpo_mega.config import load_recipe, validate_recipe
from grpo_mega.errors import ConfigError
from grpo_mega.trainer.records import RunDirectory, group_metrics
from grpo_mega.types import Completion, Group, Prompt, Rollout


def directory(path, **sections):
    tree = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "run": {"directory": str(path)}}
    return RunDirectory(validate_recipe(tree | sections))


def rollout(reward, text, *, reason="stop", near=0, **more):
    ids = tuple(text.encode())
    return Rollout(Completion(ids, (-0.5,) * len(ids), reason, text, near), reward, **more)


GROUPS = [
    Group(
        Prompt(6, "2+2=", (50, 43), answer="4"),
        (
            rollout(1.0, "4"),
            rollout(0.0, "fünf", reason="length", near=2, counts=False, parts=(("exact", 0.0),)),
        ),
    ),
    Group(
        Prompt(7, "1+1=", (49, 43), answer="2"),
        (rollout(0.5, "ab"), rollout(0.5, "abc", error="ValueError: no")),
    ),
]


def test_group_metrics_by_hand():
    assert {name: mean.value() for name, mean in group_metrics(GROUPS).items()} == {
        "reward": 0.5,  # (1 + 0 + 0.5 + 0.5) / 4
        "reward_errors": 1,
        "degenerate_groups": 1,  # of two
        "completion_tokens": 2.75,  # (1 + 5 + 2 + 3) / 4
        "truncated": 0.25,
        "near_boundary_draws": 2,
    }


def test_means_of_a_rewards_parts_by_hand():
    def group(*parts):
        return Group(Prompt(0, "p", (1,)), tuple(rollout(0.0, "x", parts=several) for several in parts))

    several = [
        group((("right", 1.0), ("short", -0.5)), (("right", 0.0), ("short", None))),
        group((), (("right", 0.5), ("short", -1.0))),  # the first was penalized: no part was asked
    ]
    metrics = {name: mean.value() for name, mean in group_metrics(several).items() if "/" in name}
    assert metrics == {"reward/right": 0.5, "reward/short": -0.75}
    assert not any("/" in name for name in group_metrics([group((("exact", 1.0),))]))  # one part is the reward


def test_rollouts_are_a_line_a_completion(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    files.write_rollouts(12, GROUPS)
    (file,) = (tmp_path / "rollouts").iterdir()  # nothing half-written is left beside it
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.name == "step_000012.jsonl" and len(lines) == 4
    assert [(line["prompt_index"], line["completion"]) for line in lines] == [(6, 0), (6, 1), (7, 0), (7, 1)]
    assert lines[1] == {
        "prompt_index": 6,
        "completion": 1,
        "prompt": "2+2=",
        "text": "fünf",
        "answer": "4",
        "reward": 0.0,
        "parts": {"exact": 0.0},
        "error": None,
        "counts": False,
        "finish_reason": "length",
        "token_ids": list("fünf".encode()),
        "sampler_logprobs": [-0.5] * 5,
    }
    assert lines[3]["error"] == "ValueError: no"


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    for step in (1, 2, 3):
        for name in ("metrics", "timings", "evaluations"):
            files.append(f"{name}.jsonl", {"step": step, "x": 0.1 * step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # the run was killed while it wrote
    files.open(3)

    def steps(name):
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    assert (steps("metrics.jsonl"), steps("timings.jsonl")) == ([1, 2], [1, 2])
    assert steps("evaluations.jsonl") == [1]  # it begins by evaluating what two steps have made
    files.append("metrics.jsonl", {"step": 3, "ratio": float("nan")})
    assert steps("metrics.jsonl") == [1, 2, 3]
    assert '"ratio": null' in (tmp_path / "metrics.jsonl").read_text()


def test_resolved_recipe_is_kept(tmp_path):
    files = directory(tmp_path, optimizer={"lr": 1e-06}, grpo={"group_size": 4})
    files.check()
    files.open(1)
    assert load_recipe(tmp_path / "recipe.yaml") == files.recipe
    files.check()  # the same settings


@pytest.mark.parametrize(
    "changed",
    [
        {"parallel": {"tensor": 2}},
        {"batch": {"tokens_per_microbatch": 8}},
        {"sampling": {"max_rows": 8}},
        {"model": {"path": "m", "recompute": "full"}},
    ],
    ids=str,
)
def test_where_and_how_long_may_change(tmp_path, changed):
    directory(tmp_path).open(1)
    directory(tmp_path, **changed).check()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"grpo": {"kl_coef": 0.1}}, "grpo.kl_coef=0.04, this recipe says 0.1"),
        ({"model": {"path": "n"}}, "model.path='m', this recipe says 'n'"),
        ({"data": {"jsonl": "d", "heldout": 3}}, "data.heldout=64, this recipe says 3"),
    ],
)
def test_another_computation_may_not_share_the_directory(tmp_path, changed, words):
    directory(tmp_path).open(1)
    with pytest.raises(ConfigError) as caught:
        directory(tmp_path, **changed).check()
    assert str(caught.value) == (
        f"run.directory={tmp_path} holds a run with {words}; use another run.directory, or go on with the settings "
        "it began with"
    )


def test_a_file_in_the_directorys_place(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"run\.directory=\S+/runs cannot be used \(it is a file\); choose another"):
        directory(tmp_path / "runs").check()
    with pytest.raises(ConfigError, match=r"run\.directory=\S+/runs/1 cannot be used \(Not a directory\)"):
        directory(tmp_path / "runs" / "1").check()
