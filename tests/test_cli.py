"""The command line as a person meets it: a whole run, and one clear sentence for each mistake."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.launcher import api as launcher

from grpo_mega import cli
from grpo_mega.config import load_recipe
from grpo_mega.parallel import mesh

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("cli") / "model", num_key_value_heads=2, **SHAPE)


@pytest.fixture
def recipe(model, tmp_path):
    """Writes recipe.yaml and its data; sections given replace keys. Returns the file's path."""

    def write(**changes):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 9)))
        (tmp_path / "my_rewards.py").write_text("def length(text, answer, row):\n    return len(text) % 3\n")
        tree = {
            "model": {"path": str(model)},
            "data": {"jsonl": str(tmp_path / "data.jsonl"), "heldout": 2},
            "reward": {"function": "my_rewards:length"},
            "sampling": {"max_completion_tokens": 4},
            "grpo": {"group_size": 2},
            "batch": {"prompts_per_step": 2},
            "run": {"directory": str(tmp_path / "run"), "num_steps": 2, "save_every": 1},
        }
        for section, keys in changes.items():
            tree[section] = {**tree.get(section, {}), **keys}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        return str(tmp_path / "recipe.yaml")

    return write


def command(*arguments, cwd, starter=()):
    """Run the real command and wait; its result, with `seconds` it took."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = time.monotonic()
    line = [sys.executable, *starter, "-m", "grpo_mega", "train", *arguments]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    done.seconds = time.monotonic() - start
    return done


def test_a_whole_run(recipe, tmp_path):
    done = command(recipe(parallel={"pipeline": 2}), "--ranks", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "run"
    assert load_recipe(run / "recipe.yaml") == load_recipe(tmp_path / "recipe.yaml")
    metrics, timings, evaluations = (
        [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "timings", "evaluations")
    )
    assert [line["step"] for line in metrics] == [line["step"] for line in timings] == [1, 2]
    assert [line["step"] for line in evaluations] == [0, 2]
    # what a second run would repeat, and what it would not, are kept apart
    measured = {"loss", "grad_norm", "kl", "ratio", "clip_fraction", "entropy", "logprob", "sampler_mismatch"}
    sampled = {"reward", "reward_errors", "degenerate_groups", "completion_tokens", "truncated", "near_boundary_draws"}
    assert set(metrics[0]) == {"step", "lr"} | measured | sampled
    assert {"sample_s", "log-probs_s", "update_s", "peak_memory_bytes_a_rank"} <= set(timings[0])
    assert timings[0]["rank_imbalance"] == 1.0 <= timings[0]["microbatch_imbalance"]  # one data-parallel rank
    assert {"step_s", "cpu_s", "sampling_tokens_per_s", "training_tokens_per_s", "tokens_per_s"} <= set(timings[0])
    files = [run / "rollouts" / f"step_{step:06d}.parquet" for step in (1, 2)]
    rollouts = [line for file in files for line in pq.read_table(file).to_pylist()]
    keys = [(line["prompt_index"], line["completion"]) for line in rollouts]
    assert keys == [(prompt, completion) for prompt in range(4) for completion in range(2)]
    assert sum(line["reward"] for line in rollouts) / 4 == sum(line["reward"] for line in metrics)
    assert (run / "checkpoints" / "latest").read_text() == "step_2\n"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step_1", "step_2"}
    loads_in_transformers(run / "hf", tmp_path)
    for curves, steps in (("training", {1, 2}), ("evaluation", {0, 2})):
        events = EventAccumulator(str(run / "tensorboard" / curves)).Reload()
        assert {event.step for event in events.Scalars("metrics/reward")} == steps
    lines = done.stdout.splitlines()
    assert [line[:11] for line in lines if line.startswith("step ")] == ["step 1/2 | ", "step 2/2 | "]
    assert sum(line.startswith("  after ") for line in lines) == 2  # of two held-out problems
    assert evaluations[0]["pass@1_low"] <= evaluations[0]["pass@1"] <= evaluations[0]["pass@1_high"]
    for name in ("reward", "pass@1"):
        before, after = (f"{line[name]:.3f} (" for line in evaluations)
        (said,) = (line for line in lines if line.startswith(f"held-out {name}: "))
        assert said.index(before) < said.index(") after 0 steps, ") < said.rindex(after) < said.index(") after 2")
    (following,) = (line for line in lines if line.startswith("next: "))
    assert f"{run}/recipe.yaml --run.num_steps 4" in following
    assert any(str(run / "hf") in line for line in lines[-5:])


def test_a_resumed_run_is_as_quiet(recipe, tmp_path):
    path = recipe(optimizer={"distributed": True}, run={"num_steps": 1, "save_every": 0}, data={"heldout": 0})
    for steps in ("1", "2"):
        done = command(path, "--ranks", "2", "--run.num_steps", steps, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert "resuming from" in done.stdout and "1 of 2 steps are done" in done.stdout


SABOTAGE = """
import pathlib, shutil
calls = []
def length(text, answer, row):
    calls.append(text)
    rollouts = pathlib.Path("run/rollouts")
    if len(calls) == 3 and rollouts.is_dir():  # a replica scores four completions: one of its own a step
        shutil.rmtree(rollouts)
        rollouts.write_text("")
    return len(text) % 3
"""


def test_a_run_directory_that_fails_ends_every_rank(recipe, tmp_path):
    """In step 2, after two of a step's four completions a rank; data parallel, so that the other rank waits."""
    path = recipe(data={"heldout": 0})
    (tmp_path / "my_rewards.py").write_text(SABOTAGE)
    done = command(path, "--ranks", "2", cwd=tmp_path)
    assert done.returncode == 6 and done.seconds < 100
    said = done.stderr.splitlines()
    assert 1 <= len(said) <= 2  # the first to fail ends the other, perhaps before its own sentence
    for line in said:
        assert re.fullmatch(
            rf"grpo-mega rank [01]: {tmp_path}/run can be written no more \(.+\); the run stops.*", line
        )
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_1\n"


ALONE = """
import os, pathlib
from grpo_mega.trainer import checkpoint
real = checkpoint.dist_checkpointing.save
def save(state, partial):
    if os.environ["RANK"] == "0":
        pathlib.Path(partial, "{file}").symlink_to("{target}")
    real(state, partial)
checkpoint.dist_checkpointing.save = save
def length(text, answer, row):
    return 0.0
"""


def test_a_rank_that_fails_alone_is_the_one_that_is_heard(recipe, tmp_path):
    """The writer cannot write the file that only it writes; the other waits for it in a collective."""
    file, target, reason = "metadata.json", "/dev/full/none", "Not a directory: .+"
    if importlib.metadata.version("megatron-core") == "0.16.1":  # 0.19.2 has no such file
        file, target, reason = "common.pt", "/dev/full", "torch could not write a whole file"
    path = recipe(data={"heldout": 0}, run={"num_steps": 1})
    (tmp_path / "my_rewards.py").write_text(ALONE.format(file=file, target=target))
    done = command(path, "--ranks", "2", cwd=tmp_path)
    assert done.returncode == 6
    *megatrons, said = done.stderr.splitlines()  # which finds the file that this test has put there odd
    words = rf"grpo-mega rank 0: \S+/checkpoints can be written no more \({reason}\); .*"
    assert re.fullmatch(words, said) and all(line.startswith("Overwriting old incomplete") for line in megatrons)


def loads_in_transformers(folder, tmp_path):
    """As a model whose weights are those that were written, and with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    weights = load_file(folder / "model.safetensors")
    first = load_file(Path(load_recipe(tmp_path / "recipe.yaml").model.path) / "model.safetensors")
    assert weights.keys() == first.keys()
    assert all(model.state_dict()[name].equal(weight) for name, weight in weights.items())
    assert any(not weight.equal(first[name]) for name, weight in weights.items())  # it was trained
    assert AutoTokenizer.from_pretrained(folder).encode("x") == [87]


# ---- bad input: (the recipe's changes, more arguments, exit code, the sentence)

MISTAKES = {
    "missing model folder": (
        {"model": {"path": "models/none"}}, [], 2,
        r"model folder models/none does not exist; give a Hugging Face folder \(config\.json and safetensors\)",
    ),
    "unknown architecture": (
        {"model": {"path": "mamba"}}, [], 2,
        r"mamba/config\.json names the architecture 'MambaForCausalLM'; supported: Llama.+, Mixtral.+",
    ),
    "heads not divisible": (
        {"parallel": {"tensor": 3}}, [], 2,
        r"parallel\.tensor=3 does not divide the model's 4 attention heads.* in \[1, 2, 4\]; nearest on [23] ranks: .+",
    ),
    "empty data line": ({"data": {"jsonl": "empty_line"}}, [], 3, r"empty_line:2: the line is empty; delete it"),
    "malformed data line": (
        {"data": {"jsonl": "malformed"}}, [], 3,
        r"malformed:3: '\{\"prompt\":' is not JSON \(.*\); write one JSON object a line",
    ),
    "empty data": (
        {"data": {"jsonl": "empty"}}, [], 3,
        r"data\.jsonl=empty is empty; give a file of one JSON object a line",
    ),
    "prompt too long": (
        {"data": {"jsonl": "long", "heldout": 0}}, [], 3,
        r"long:2: the prompt has 202 tokens, .*max_completion_tokens=4 too many for a context of 128; remove the row, "
        r"or set data\.overlong to skip or truncate_left",
    ),
    "group of one": (
        {"grpo": {"group_size": 1}}, [], 2,
        r".*grpo\.group_size=1 leaves nothing to compare .*; use 2 or more.*",
    ),
    "fp16": ({"precision": {"dtype": "fp16"}}, [], 2, r".*precision\.dtype='fp16' is refused: .*; use bf16 or fp32"),
    "unknown key": ({"grpo": {"groupsize": 4}}, [], 2, r".*unknown key grpo\.groupsize; did you mean 'group_size'\?"),
    "unknown override": (
        {}, ["--grpo.group_siz", "4"], 2,
        r".*unknown key grpo\.group_siz; did you mean 'group_size'\?",
    ),
    "no such reward": (
        {"reward": {"function": "no_such_package:score"}}, [], 4,
        r"reward\.function='no_such_package:score': module no_such_package does not import .*; it is looked for in .*",
    ),
    "wrong signature": (
        {"reward": {"function": "wrong:score"}}, [], 4,
        r"reward\.function='wrong:score' has the signature \(text\) \(too many positional arguments\), but is called "
        r"with three positional arguments: the completion's text, the answer \(or None\) and the data row",
    ),
    "unknown reward option": (
        {"reward": {"function": "regex", "options": {"patern": "a"}}}, [], 2,
        r".*reward\.options\.patern is no option of regex; did you mean 'pattern'\?",
    ),
    "length that is never reached": (
        {"reward": {"function": "length", "options": {"start": 4}}}, [], 2,
        r".*reward\.options\.start=4 is not below end=4 and .*; lower start",
    ),
    "no answers for exact": (
        {"reward": {"function": "exact"}, "data": {"heldout": 0}}, [], 3,
        r".*data\.jsonl:1 has no answer, which reward\.function=exact compares with; name the field .*",
    ),
    "unwritable run directory": (
        {"run": {"directory": "malformed"}}, [], 2,
        r"run\.directory=malformed cannot be used \(it is a file\); choose another",
    ),
}  # fmt: skip


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    """The current directory, with the files that the mistakes name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(mesh, "initialize", lambda *_: pytest.fail("a mistake came as far as the process group"))
    monkeypatch.setattr(launcher, "elastic_launch", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "empty_line").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    (tmp_path / "malformed").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    (tmp_path / "empty").write_text("")
    (tmp_path / "wrong.py").write_text("def score(text): return 1.0\n")
    (tmp_path / "long").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "x" * 200}) + "\n")
    (tmp_path / "mamba").mkdir()
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("layouts", "devices", "memory", "ranks"),
    [
        ({}, 8, 1 << 40, 2),  # no more replicas than the two prompts of a step
        ({"parallel": {"pipeline": 2}}, 3, 1 << 40, 2),  # whole replicas only
        ({}, 2, 1 << 30, 1),  # memory for less than one replica
        ({"parallel": {"pipeline": 2}}, 1, 1 << 40, 2),  # one replica at least
        ({"reference": {"tensor": 2}}, 3, 1 << 40, 2),  # of the reference too
        ({"parallel": {"pipeline": 2}, "sampling": {"tensor": 4, "pipeline": 1}}, 7, 1 << 40, 4),
    ],
)
def test_alone_it_fills_the_machine(recipe, monkeypatch, layouts, devices, memory, ranks):
    from grpo_mega.parallel import device

    monkeypatch.setattr(device, "local_devices", lambda: devices)
    monkeypatch.setattr(device, "free_memory_bytes", lambda: memory)
    assert cli.ranks_to_fill(load_recipe(recipe(**layouts))) == ranks


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_on_every_rank(here, recipe, monkeypatch, capsys, mistake, rank):
    """As a rank that torchrun has started: read and refused alone, before anything that waits for another rank."""
    changes, arguments, code, sentence = MISTAKES[mistake]
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["train", recipe(**changes), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"grpo-mega rank {rank}: {sentence}\n", err), err


def test_a_world_that_does_not_fit(here, recipe, monkeypatch, capsys):
    path = recipe(parallel={"pipeline": 2})
    sentence = (
        "3 ranks do not divide into replicas of parallel.tensor=1 x parallel.pipeline=2 = 2 ranks; start 2 ranks or a "
        "multiple, or change the layout; nearest on 3 ranks: no cut at all, context 3\n"
    )
    assert cli.run(["train", path, "--ranks", "3"]) == 2
    assert cli.run(["train", path, "--ranks", "0"]) == 2
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.run(["train", path]) == 2
    nothing = "--ranks=0 starts nothing; give at least 1\n"
    assert capsys.readouterr().err == f"grpo-mega: {sentence}grpo-mega: {nothing}grpo-mega rank 2: {sentence}"


CHEAP = [name for name, (*_, code, _) in MISTAKES.items() if code == 2 and "directory" not in name]


@pytest.mark.parametrize("mistake", CHEAP)
def test_what_needs_no_data_is_refused_before_ranks_are_started(here, recipe, capsys, mistake):
    changes, arguments, code, sentence = MISTAKES[mistake]
    assert cli.run(["train", recipe(**changes), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"grpo-mega: {sentence}\n", err), err


def test_a_missing_recipe(capsys):
    assert cli.run(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == (
        "grpo-mega: recipe nowhere.yaml cannot be read (No such file or directory); give the path of a YAML file\n"
    )


@pytest.mark.parametrize("starter", ["own", "torchrun"])
def test_two_real_ranks_end_at_once(here, recipe, starter):
    """The first to fail ends the other, which may be quicker than the other's own sentence."""
    path = recipe(data={"jsonl": "malformed"})
    if starter == "own":
        done = command(path, "--ranks", "2", cwd=here)
        assert done.returncode == 3
    else:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "1"]
        done = command(path, cwd=here, starter=torchrun)
        assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "malformed:3:" in line]
    assert 1 <= len(said) <= 2 and all(line.startswith("grpo-mega rank ") for line in said)
    if starter == "own":  # torchrun adds a report of its own
        assert len(said) == len(done.stderr.splitlines())
    assert str(ROOT / "grpo_mega") not in done.stderr  # no traceback of ours
    assert done.seconds < 60


def test_a_reward_that_is_down_ends_every_rank_with_its_reason(here, recipe):
    (here / "judge.py").write_text("def judge(texts, answers, rows):\n    raise ConnectionError('no judge at 8000')\n")
    parts = {"judge": {"function": "judge:judge", "batch": True}, "short": {"function": "length"}}
    path = recipe(reward={"function": None, "parts": parts}, run={"num_steps": 9, "save_every": 0}, data={"heldout": 0})
    done = command(path, "--ranks", "2", cwd=here)
    assert done.returncode == 4, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("grpo-mega rank ")]
    assert 1 <= len(said) <= 2 and all(
        re.fullmatch(
            r"grpo-mega rank [01]: the reward failed for every completion of 3 steps in a row, first at prompt 4, "
            r"completion 0: judge: ConnectionError: no judge at 8000; mend the function and start again: .*",
            line,
        )
        for line in said
    )
    told = "step 1: the reward failed for 4 completions, first at prompt 0, completion 0: judge: ConnectionError"
    assert told in done.stdout
    metrics = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["reward"], line["reward_errors"], line["reward/judge"]) for line in metrics] == [(0.0, 4, None)] * 2
    assert all(-1 <= line["reward/short"] < 0 for line in metrics)
    rollouts = [row for file in (here / "run" / "rollouts").iterdir() for row in pq.read_table(file).to_pylist()]
    assert len(rollouts) == 12 and all(row["error"].startswith("judge: ") for row in rollouts)


def test_a_real_process_refuses_at_once(here, recipe):
    done = command(recipe(model={"path": "models/none"}), "--ranks", "2", cwd=here)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.seconds < 30
