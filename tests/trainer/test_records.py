"""What a run leaves behind, and what it takes back when steps are run again."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.config import GrpoConfig, load_recipe, validate_recipe
from grpo_mega.data.advantages import with_advantages
from grpo_mega.errors import ConfigError, RunDirectoryError
from grpo_mega.parallel import mesh
from grpo_mega.trainer.records import (
    RunDirectory,
    StepCost,
    group_metrics,
    step_timings,
    write_together,
    writing,
)
from grpo_mega.types import Completion, Group, Prompt, Rollout


def directory(path, **sections):
    tree = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "run": {"directory": str(path)}}
    return RunDirectory(validate_recipe(tree | sections))


def rollout(reward, text, *, reason="stop", near=0, **more):
    ids = tuple(text.encode())
    return Rollout(Completion(ids, (-0.1,) * len(ids), reason, text, near), reward, **more)


SCORED = [
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
GROUPS = with_advantages(SCORED, GrpoConfig())


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


def test_rollouts_are_a_row_a_completion(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    files.write_rollouts(12, GROUPS)
    (file,) = (tmp_path / "rollouts").iterdir()  # nothing half-written is left beside it
    rows = pq.read_table(file).to_pylist()
    assert file.name == "step_000012.parquet" and len(rows) == 4
    assert [(row["prompt_index"], row["completion"]) for row in rows] == [(6, 0), (6, 1), (7, 0), (7, 1)]
    assert rows[1] == {
        "step": 12,
        "prompt_index": 6,
        "completion": 1,
        "prompt": "2+2=",
        "prompt_token_ids": [50, 43],
        "text": "fünf",
        "token_ids": list("fünf".encode()),
        "sampler_logprobs": [-0.1] * 5,  # the very float64
        "finish_reason": "length",
        "answer": "4",
        "reward": 0.0,
        "rewards": [{"name": "exact", "value": 0.0}],
        "advantage": pytest.approx(-1, abs=1e-5),  # (0 - 0.5) / 0.5
        "counts": False,
        "error": None,
        "near_boundary": 2,
        "steps": [],
        "messages": "[]",
    }
    assert rows[3]["error"] == "ValueError: no" and rows[3]["advantage"] == 0


def test_rollouts_by_other_readers(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    files.write_rollouts(1, GROUPS)
    file = str(tmp_path / "rollouts" / "step_000001.parquet")
    frame = pd.read_parquet(file)
    assert frame.groupby("prompt_index").reward.mean().to_dict() == {6: 0.5, 7: 0.5}
    loaded = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
    assert loaded["text"][:] == ["4", "fünf", "ab", "abc"] and loaded[0]["sampler_logprobs"] == [-0.1]


def test_parts_of_a_reward(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    one, other = (rollout(0.0, text).completion for text in ("a", "b"))
    scored = (
        Rollout(one, 1.5, parts=(("exact", 1.0), ("format", 0.5))),
        Rollout(other, 0.25, parts=(("exact", 0.0), ("format", None))),
    )
    files.write_rollouts(1, [Group(Prompt(0, "p", (1,)), scored)])
    rows = pq.read_table(tmp_path / "rollouts" / "step_000001.parquet").to_pylist()
    assert [row["rewards"] for row in rows] == [
        [{"name": "exact", "value": 1.0}, {"name": "format", "value": 0.5}],
        [{"name": "exact", "value": 0.0}, {"name": "format", "value": None}],
    ]


def test_half_a_surrogate_pair_costs_a_character(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    files.write_rollouts(1, [replace(GROUPS[0], prompt=Prompt(0, "p", (1,), answer="\ud83d!"))])
    assert pq.read_table(tmp_path / "rollouts" / "step_000001.parquet")["answer"][0].as_py() == "?!"


def test_what_is_recorded_of_steps_that_are_run_again_is_dropped(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    for step in (1, 2, 3):
        files.write_rollouts(step, GROUPS)
        files.write_step(step, {"x": 0.1 * step}, {"y": 1.5})
        files.write_heldout(step, {"reward": 0.5})
    files.close()
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # the run was killed while it wrote
    (tmp_path / "rollouts" / "step_000004.parquet.partial").write_bytes(b"")
    files.open(3)

    def steps(name):
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    assert (steps("metrics.jsonl"), steps("timings.jsonl")) == ([1, 2], [1, 2])
    assert steps("evaluations.jsonl") == [1]  # it begins by evaluating what two steps have made
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == kept
    rollouts = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert rollouts == ["step_000001.parquet", "step_000002.parquet"]
    files.write_step(3, {"ratio": float("nan")}, {})
    assert steps("metrics.jsonl") == [1, 2, 3]
    assert '"ratio": null' in (tmp_path / "metrics.jsonl").read_text()


def test_curves_show_no_step_twice(tmp_path):
    """As TensorBoard reads them: a run of three steps that goes on from its second one."""
    files = directory(tmp_path)
    files.open(1)
    files.write_heldout(0, {"reward": 0.1, "pass@2": 0.25, "problems": 9})
    for step in (1, 2, 3):
        files.write_step(step, {"reward": step / 8, "ratio": float("nan")}, {"step_s": 2.0})
    files.close()
    files.open(3)
    files.write_heldout(2, {"reward": 0.2, "pass@2": 0.5})
    for step in (3, 4):
        files.write_step(step, {"reward": step / 4}, {"step_s": 3.0})
    files.write_heldout(4, {"reward": 0.4, "pass@2": float("nan")})  # on disk without close: a run may be killed
    curves = {}
    for run in ("training", "evaluation"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / run)).Reload()
        curves |= {(run, tag): [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves == {
        ("training", "metrics/reward"): [(1, 0.125), (2, 0.25), (3, 0.75), (4, 1.0)],
        ("training", "timings/step_s"): [(1, 2.0), (2, 2.0), (3, 3.0), (4, 3.0)],
        ("evaluation", "metrics/reward"): [(0, pytest.approx(0.1)), (2, pytest.approx(0.2)), (4, pytest.approx(0.4))],
        ("evaluation", "metrics/pass@2"): [(0, 0.25), (2, 0.5)],
    }
    files.close()


def test_a_steps_costs_by_hand():
    seconds = {"sample": 2.0, "reward": 0.5, "gather": 1.5, "log-probs": 1.0, "update": 3.0}
    costs = [StepCost(2.0, 7.0, 1 << 30, [[30.0, 10.0]]), StepCost(2.5, 6.5, 3 << 30, [[20.0, 0.0]])]
    assert step_timings(seconds, 8.0, costs, 1000, 1000) == {
        **{f"{name}_s": spent for name, spent in seconds.items()},
        "step_s": 8.0,
        "cpu_s": 13.5,
        "completion_tokens": 1000,
        "tokens_per_s": 125.0,
        "sampling_tokens_per_s": 400.0,  # by the slowest rank
        "training_tokens_per_s": 250.0,
        "rank_imbalance": 1.3333,  # 40 of a mean of 30
        "microbatch_imbalance": 2.0,  # 30 of a mean of 15
        "peak_memory_bytes_a_rank": 3 << 30,
    }


# ---- a directory that fails while the run goes on

STOPS = (
    "can be written no more (No space left on device); the run stops: free space, or make the directory writable, and "
    "start the same command again: it goes on from its latest checkpoint"
)


def full(path):
    """Whatever is written there meets a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("file", ["metrics.jsonl", "timings.jsonl"])
def test_a_disk_that_is_full_when_a_step_is_recorded(tmp_path, file):
    files = directory(tmp_path)
    files.open(1)
    full(tmp_path / file)
    with pytest.raises(RunDirectoryError) as caught:
        files.write_step(1, {"x": 0.1}, {})
    assert str(caught.value) == f"{tmp_path} {STOPS}" and caught.value.exit_code == 6


def test_rollouts_are_whole_or_not_there(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    full(tmp_path / "rollouts" / "step_000001.parquet.partial")
    with pytest.raises(RunDirectoryError, match="No space left"):
        files.write_rollouts(1, GROUPS)
    assert list((tmp_path / "rollouts").iterdir()) == []
    (tmp_path / "rollouts").rmdir()
    with pytest.raises(RunDirectoryError, match="No such file or directory"):
        files.write_rollouts(1, GROUPS)


def test_curves_on_a_full_disk(tmp_path):
    files = directory(tmp_path)
    files.open(1)
    files._curves["training"]._records._writer = open("/dev/full", "wb")  # noqa: SIM115 (closed by files.close)
    with pytest.raises(RunDirectoryError, match="No space left"):
        files.write_step(1, {"x": 0.1}, {})


def write_and_fail(where):
    grid = mesh.initialize(1, 1)

    def write():
        assert grid.is_writer
        with writing(where):
            open(where / "nowhere" / "file")  # noqa: SIM115

    try:
        write_together(grid, write)
    except RunDirectoryError as error:
        return str(error)


def test_the_writers_failure_is_every_ranks(ranks, tmp_path):
    answers = ranks(2, write_and_fail, tmp_path)
    assert answers[0] == answers[1] and answers[0].startswith(f"{tmp_path} can be written no more (No such file")


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
        {"batch": {"tokens_per_microbatch": 8, "fixed_rows": True}},
        {"sampling": {"max_rows": 8}},
        {"model": {"path": "m", "recompute": "full"}},
        {"evaluation": {"completions": 8, "pass_at": [1, 8]}},
    ],
    ids=str,
)
def test_where_and_how_long_may_change(tmp_path, changed):
    directory(tmp_path).open(1)
    changed_run = directory(tmp_path, **changed)
    changed_run.check()
    changed_run.open(1)
    assert load_recipe(tmp_path / "recipe.yaml") == changed_run.recipe != directory(tmp_path).recipe


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


def test_a_directory_in_which_nothing_can_be_made():
    with pytest.raises(ConfigError, match=r"run\.directory=/proc/here cannot be used \(No such file or directory\)"):
        directory("/proc/here").check()
    with pytest.raises(ConfigError, match=r"run\.directory=/proc/self cannot be used \(.+\); choose another"):
        directory("/proc/self").check()  # there, and writable by its permission bits
