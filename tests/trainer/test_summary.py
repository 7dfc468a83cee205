"""`grpo-mega report`: what a person reads of a run directory, whole, half-written, empty or none."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from grpo_mega import cli
from grpo_mega.config import GrpoConfig, validate_recipe
from grpo_mega.data.advantages import with_advantages
from grpo_mega.errors import ConfigError
from grpo_mega.trainer.records import RunDirectory
from grpo_mega.trainer.summary import medians, print_summary
from grpo_mega.types import Completion, Group, Prompt, Rollout


def timings(seconds):
    return {
        "step_s": seconds + 2, "sample_s": seconds, "reward_s": 0.0, "gather_s": 0.0, "log-probs_s": 0.5,
        "update_s": 1.5, "cpu_s": 2 * seconds, "completion_tokens": 100, "tokens_per_s": 10.0 * seconds,
        "sampling_tokens_per_s": 50.0, "training_tokens_per_s": 25.0, "peak_memory_bytes_a_rank": 1 << 30,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run directory of no steps, open to be written."""
    directory = tmp_path / "run"
    directory.mkdir()
    tree = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "grpo": {"kl_coef": 0.0}}
    files = RunDirectory(validate_recipe(tree | {"run": {"directory": str(directory), "num_steps": 30}}))
    files.open(1)
    yield files
    files.close()


def summary(path):
    stream = io.StringIO()
    print_summary(path, Console(file=stream, width=120))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def rollout(reward, text):
    return Rollout(Completion((1, 2), (-0.1, -0.2), "stop", text), reward)


def test_a_run_by_hand(run):
    for step in range(1, 25):
        metrics = {"reward": step / 32, "clip_fraction": 0.25, "entropy": float("nan"), "reward_errors": step == 3}
        run.write_step(step, metrics, timings(float(step)))
    run.write_heldout(0, {"reward": 0.125})  # an older run's
    run.write_heldout(24, {"reward": 0.75, "reward_low": 0.5, "reward_high": 1.0, "pass@4": 0.9, "pass@4_low": None})
    groups = [
        Group(Prompt(n, f"question {n}", (1,), "42"), (rollout(0.0, "no"), rollout(n, "x\x1b[2J\ny"))) for n in (1, 2)
    ]
    groups = with_advantages(groups, GrpoConfig())
    run.write_rollouts(23, groups[:1])
    run.write_rollouts(24, groups)
    lines = summary(run.path)
    assert lines[0] == f"{run.path}: 24 of 30 steps"
    assert "  grpo       kl_coef=0.0" in lines and "  run        num_steps=30" in lines
    at = next(n for n, line in enumerate(lines) if line.startswith("steps"))
    assert lines[at].split() == ["steps", "reward", "clip"]  # what is nowhere measured has no column
    assert [line.split() for line in lines[at + 1 : at + 13]][::11] == [
        ["1-2", "0.047", "0.250"],
        ["23-24", "0.734", "0.250"],
    ]
    assert lines[at + 13].startswith("reward, the last 60 steps: ▁▁") and lines[at + 13].endswith("██")
    assert lines[at + 14 : at + 21] == [
        "completions whose reward failed: 1",
        "held-out problems after so many steps (in brackets 95 % intervals):",
        "  reward  0.125 after 0, 0.750 (0.500 to 1.000) after 24",
        "  pass@4  0.900 after 24",
        "a step took 14.5 s (medians of 24): sample 12.5, log-probs 0.5, update 1.5",
        "completion tokens a second: 125; sampling alone 50, log-probs and update 25",
        "CPU time of a step 25.0 s; peak memory a rank 1.00 GiB",
    ]
    assert lines[at + 22 :] == [
        f"last rollouts: {run.path}/rollouts/step_000024.parquet, 4 completions",
        "  best: reward 2, advantage +1.00, 2 tokens, stop",
        "    prompt      question 2   (answer 42)",
        "    completion  x\ufffd[2J y",  # nothing that could move the cursor
        "  worst: reward 0, advantage -1.00, 2 tokens, stop",
        "    prompt      question 2   (answer 42)",
        "    completion  no",
    ]


def test_of_many_evaluations_the_first_and_the_last(run):
    for step in range(10):
        run.write_heldout(step, {"reward": step / 10})
    (line,) = (line for line in summary(run.path) if line.startswith("  reward  "))
    assert line.removeprefix("  reward  ").split(", ") == [f"0.{step}00 after {step}" for step in (0, 5, 6, 7, 8, 9)]


def test_a_run_on_demonstrations_by_hand(run):
    """Its curve is the loss; nothing was sampled, and nothing scored."""
    times = {key: value for key, value in timings(2.0).items() if key not in ("sampling_tokens_per_s", "sample_s")}
    for step, loss in ((1, 3.0), (2, 1.0)):
        run.write_step(step, {"loss": loss, "completion_tokens": 2.0}, times)
    shown = (Completion((1, 2), (0.0, 0.0), "stop", text, drawn=False) for text in ("one", "two"))
    groups = [Group(Prompt(n, f"question {n}", (1,)), (Rollout(one, 1.0),)) for n, one in enumerate(shown)]
    run.write_rollouts(2, with_advantages(groups, GrpoConfig(group_size=1, advantage="best_of_n")))
    lines = summary(run.path)
    at = next(n for n, line in enumerate(lines) if line.startswith("steps"))
    assert [line.split() for line in lines[at : at + 3]] == [
        ["steps", "loss", "tokens"], ["1", "+3.0000", "2.0"], ["2", "+1.0000", "2.0"],
    ]  # fmt: skip
    assert lines[at + 3] == "loss, the last 60 steps: █▁"
    assert "completion tokens a second: 20; log-probs and update 25" in lines
    assert [line for line in lines if line.startswith("  ") and "tokens, stop" in line] == [
        "  first: 2 tokens, stop",
        "  last: 2 tokens, stop",
    ]


def test_no_step_yet(run):
    lines = summary(run.path)
    assert lines[0] == f"{run.path}: 0 of 30 steps" and lines[-1] == "no step is recorded yet"


def test_what_a_killed_run_left_half_written(run):
    run.write_step(1, {"reward": 0.5}, timings(1.0))
    for name in ("metrics", "timings"):
        with (run.path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
    (run.path / "rollouts" / "step_000002.parquet").write_bytes(b"PAR1 and then nothing")
    lines = summary(run.path)
    assert lines[:2] == [
        f"{run.path}: 1 of 30 steps",
        "metrics.jsonl: 1 lines are no whole record (the run was ended while it wrote); passed over",
    ]
    assert lines[-1].startswith(f"{run.path}/rollouts/step_000002.parquet cannot be read (")


def test_timings_of_an_older_run_are_enough():
    row = timings(1.0)
    del row["cpu_s"]
    assert medians([row, row])["step"] == 3.0 and medians([row])["cpu"] != medians([row])["cpu"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", r"nowhere does not exist; give a run directory \(run\.directory of its recipe\)"),
        ("file", r"file is a file; give a run directory"),
        ("folder", r"folder is no run directory: it holds no recipe\.yaml; "),
    ],
)
def test_what_is_no_run_directory(tmp_path, capsys, name, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=words):
        summary(tmp_path / name)
    assert cli.run(["report", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"grpo-mega: {tmp_path / name} ") and len(err.splitlines()) == 1


def test_the_command(run, capsys):
    run.write_step(1, {"reward": 0.5}, timings(1.0))
    assert cli.run(["report", str(run.path)]) == 0
    assert f"{run.path}: 1 of 30 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.run(["report", str(run.path), "--steps"])


def test_it_waits_for_neither_torch_nor_megatron():
    code = "import sys, grpo_mega.trainer.summary, grpo_mega.cli; print({'torch', 'megatron'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
