"""`grpo-mega eval`: the same numbers under every layout and as in the training loop, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks as pool
import tiny
import torch
import yaml

from grpo_mega import cli
from grpo_mega.config import validate_recipe
from grpo_mega.errors import CheckpointError
from grpo_mega.parallel import launch, mesh
from grpo_mega.trainer import main, standalone

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {  # parallel; other sections
    "tensor 2": ({"tensor": 2, "sequence": True}, {}),
    "pipeline 2": ({"pipeline": 2}, {"sampling": {"max_rows": 5}}),  # less than a problem's completions
    "data 2": ({}, {}),
    "own layout": ({"context": 2}, {"sampling": {"tensor": 2}}),
}
MADE = ["prompt", "token_ids", "reward", "correct", "vote"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A recipe of one step, by whose reward an answer is the last of the letters a to d: right, wrong, or not there."""
    folder = tmp_path_factory.mktemp("standalone")
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(folder / "model", num_key_value_heads=2, **shape)
    for name, lengths in (("train", range(1, 6)), ("test", range(6, 13))):
        rows = [{"prompt": "x" * n, "answer": "abcd"[n % 4]} for n in lengths]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(model)},
        "data": {"jsonl": str(folder / "train.jsonl"), "heldout_source": {"jsonl": str(folder / "test.jsonl")}},
        "reward": {"function": "regex", "options": {"pattern": "([a-d])", "group": 1}},
        "sampling": {"max_completion_tokens": 40},
        "evaluation": {"completions": 6, "pass_at": [1, 2, 6], "maj_at": [1, 5], "temperature": 0.9},
        "grpo": {"group_size": 2},
        "batch": {"prompts_per_step": 2},
        "run": {"directory": str(folder / "run"), "num_steps": 1},
    }


def changed(tree, **sections):
    return {**tree, **{name: {**tree.get(name, {}), **keys} for name, keys in sections.items()}}


def evaluated(tree, output):
    standalone.evaluate_model(validate_recipe(tree), str(output))


def trained(tree):
    main.train(validate_recipe(tree))


def made(world, tree, output):
    """(evaluation.json, completions) of the command under `tree` on so many ranks."""
    pool.ranks(world, evaluated, tree, output, timeout=100)
    return read(output)


def read(output):
    result = json.loads((output / "evaluation.json").read_text())
    return result, pq.read_table(output / "completions.parquet", columns=MADE).to_pylist()


@pytest.fixture(scope="module")
def alone(tree, tmp_path_factory):
    return made(1, tree, tmp_path_factory.mktemp("alone") / "made")


def test_what_is_compared_says_something(alone):
    result, rows = alone
    assert (result["problems"], result["completions"], result["correct"]) == (7, 6, "regex") and len(rows) == 42
    metrics = {name: of["mean"] for name, of in result["metrics"].items()}
    assert 0 < metrics["pass@1"] < metrics["pass@2"] < metrics["pass@6"] < 1
    assert metrics["maj@1"] == pytest.approx(metrics["pass@1"]) and metrics["maj@5"] != metrics["maj@1"]
    assert metrics["pass@1"] == pytest.approx(sum(row["correct"] for row in rows) / 42)
    assert {row["vote"] for row in rows} == {None, "a", "b", "c", "d"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_changes_a_number(tree, alone, tmp_path, name):
    parallel, sections = LAYOUTS[name]
    result, rows = made(2, changed(tree, parallel=parallel, **sections), tmp_path / "made")
    wanted, completions = alone
    assert rows == completions, f"{wanted['near_boundary_draws']} draws were near a boundary"
    for found in (result, wanted := dict(wanted)):
        found.pop("near_boundary_draws")
    assert result == wanted


def test_a_runs_own_numbers(tree, tmp_path):
    """The evaluations of a run, and of what it began with and left behind."""
    run = tmp_path / "run"
    of_run = changed(tree, run={"directory": str(run)}, optimizer={"lr": 0.01})
    pool.ranks(1, trained, of_run, timeout=100)
    before, after = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert (before["step"], after["step"]) == (0, 1) and before != after | {"step": 0}
    for line, path, name in (
        (before, tree["model"]["path"], "model"),
        (after, run / "checkpoints" / "step_1", "step_1"),
    ):
        settings = changed(of_run, model={"path": str(path)}, reference={"path": "nowhere"})
        result, rows = made(1, settings, run / "evaluations" / name)
        assert result["step"] == line["step"] and len(rows) == 42
        for metric, of in result["metrics"].items():
            assert {
                metric: of["mean"],
                f"{metric}_low": of["low"],
                f"{metric}_high": of["high"],
            }.items() <= line.items()
    result, _ = made(1, changed(of_run, model={"path": str(run / "hf")}), tmp_path / "of_hf")
    assert result["step"] == 0  # a model's folder says nothing of steps: the same policy, other draws


def test_greedy_is_the_likeliest_token(tree, tmp_path):
    from transformers import AutoModelForCausalLM

    greedy = {"completions": 1, "pass_at": [1], "maj_at": [], "temperature": 0, "max_completion_tokens": 12}
    output = tmp_path / "made"
    result, _ = made(1, changed(tree, evaluation=greedy, sampling={"temperature": 2.0}), output)
    assert (result["temperature"], result["max_completion_tokens"], result["completions"]) == (0, 12, 1)
    model = AutoModelForCausalLM.from_pretrained(tree["model"]["path"])
    for row in pq.read_table(output / "completions.parquet").to_pylist():
        ids = torch.tensor([row["prompt_token_ids"]])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert row["token_ids"] == wanted[0, ids.shape[1] :].tolist()
        assert row["sampler_logprobs"] == [0.0] * len(row["token_ids"])  # nothing else could have been drawn


def test_the_command(tree, alone, tmp_path, monkeypatch, capsys):
    """As a person types it, with a held-out source alone; it starts its own ranks, and overwrites nothing."""
    recipe = changed(tree, data={"jsonl": None}, run={"directory": str(tmp_path / "run")})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, "-m", "grpo_mega", "eval", "recipe.yaml", "--ranks", "2", "--parallel.pipeline", "2"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    wanted, completions = alone
    output = tmp_path / "run" / "evaluations" / "model"
    result, rows = read(output)
    assert rows == completions and result["metrics"] == wanted["metrics"]
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "completions.parquet", "recipe.yaml"}
    lines = done.stdout.splitlines()
    of = wanted["metrics"]["pass@2"]
    assert f"pass@2            {of['mean']:>9.3f}   {of['low']:.3f} to {of['high']:.3f}" in lines
    assert lines[-1] == f"records: {output}/" and any(line.startswith("held out ") for line in lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli.run(words[3:]) == 2
    assert capsys.readouterr() == (
        "",
        f"grpo-mega: {output} holds an evaluation already; name another folder with --output, or delete it\n",
    )


MISTAKES = {
    "a group smaller than k": (
        ["eval"], {"evaluation": {"pass_at": [8]}}, 2,
        r".*evaluation\.pass_at=\[8\] and evaluation\.completions=6: pass@8 is about 8 completions of one problem, .*",
    ),
    "nothing held out": (
        ["eval"], {"data": {"heldout_source": None, "heldout": 0}, "evaluation": None}, 2,
        r"data\.heldout=0 leaves no problem to evaluate on; set data\.heldout",
    ),
    "no room for its completions": (
        ["eval"], {"evaluation": {"max_completion_tokens": 120}}, 3,
        r".*test\.jsonl:\d: the prompt has \d+ tokens, with evaluation\.max_completion_tokens=120 too many for a "
        r"context of 128; remove the row, lower evaluation\.max_completion_tokens to \d+, or set data\.overlong .*",
    ),
    "a layout that does not fit": (
        ["eval"], {"parallel": {"tensor": 3}}, 2,
        r"parallel\.tensor=3 does not divide the model's 4 attention heads.*",
    ),
    "an output that is a file": (
        ["eval", "--output", "recipe.yaml"], {}, 2,
        r"--output=recipe\.yaml cannot be used \(it is a file\); choose another",
    ),
    "nothing to train on": (
        ["train"], {"data": {"jsonl": None}}, 2,
        r"data\.heldout_source alone is for grpo-mega eval, and leaves nothing to train on; give exactly one of "
        r"data\.jsonl, data\.parquet, data\.dataset, data\.reasoning_gym, or a list data\.sources",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(tree, tmp_path, monkeypatch, capsys, mistake):
    arguments, sections, code, sentence = MISTAKES[mistake]
    settings = changed(tree, **{name: keys for name, keys in sections.items() if keys is not None})
    settings = {name: keys for name, keys in settings.items() if sections.get(name, {}) is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(mesh, "initialize", lambda *_, **__: pytest.fail("a mistake came as far as the process group"))
    assert cli.run([arguments[0], "recipe.yaml", *arguments[1:]]) == code
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"grpo-mega rank 1: {sentence}\n", err), err


def test_a_checkpoint_whose_steps_cannot_be_read(tmp_path, monkeypatch):
    class Found:
        folder = tmp_path

    class Arch:
        folder = tmp_path

    monkeypatch.setattr(standalone, "find_checkpoint", lambda _: Found)
    assert standalone.steps_of(Arch) == 0
    (tmp_path / "trainer.json").write_text('{"step": 12}')
    assert standalone.steps_of(Arch) == 12
    (tmp_path / "trainer.json").write_text('{"step"')
    with pytest.raises(
        CheckpointError, match=r"trainer\.json is damaged \(JSONDecodeError: .*\); take another checkpoi"
    ):
        standalone.steps_of(Arch)
