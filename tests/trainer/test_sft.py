"""Supervised fine-tuning: transformers' cross entropy on the demonstrations, under any layout; and it resumes."""

from __future__ import annotations

import json
from unittest import mock

import pyarrow.parquet as parquet
import pytest
import ranks as pool
import tiny
import torch
from safetensors.torch import load_file

from grpo_mega.config import validate_recipe
from grpo_mega.parallel import mesh
from grpo_mega.trainer import collect, loop, main, setup
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import build_run, read_inputs

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
SHOWN = {"1+1": "2", "0+3": "three", "7-2": "5!", "9-9": "nothing at all", "2*3": "66"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A recipe's sections but for parallel and run: conversations of one question and its answer."""
    folder = tmp_path_factory.mktemp("sft")
    shape = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(folder / "model", num_key_value_heads=2, **shape)
    data, template = folder / "data.jsonl", folder / "turns.jinja"
    template.write_text(TURNS)
    chats = [[{"role": "user", "content": u}, {"role": "assistant", "content": a}] for u, a in SHOWN.items()]
    data.write_text("".join(json.dumps({"prompt": chat, "answer": chat[1]["content"]}) + "\n" for chat in chats))
    return {
        "preset": "sft",
        "model": {"path": str(model)},
        "data": {"jsonl": str(data), "heldout": 0, "chat_template": str(template)},
        "sampling": {"max_completion_tokens": 15},
        "batch": {"prompts_per_step": 3, "tokens_per_microbatch": 24},
        "optimizer": {"lr": 0.01, "warmup_steps": 2},
    }


def with_run(tree, directory, steps, *, save_every=0, **parallel):
    run = {"directory": str(directory), "num_steps": steps, "save_every": save_every}
    return tree | {"parallel": parallel, "run": run}


def fine_tuned(tree):
    """One rank's training, with no sampler to be built: none is needed where nothing is held out."""
    recipe = validate_recipe(tree)
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(**recipe.parallel.sizes)
    with mock.patch.object(setup, "build_samplers", side_effect=AssertionError("a sampler")):
        run = build_run(recipe, inputs, grid, Progress(None))
    assert inputs.reward == ()
    if grid.is_writer:
        inputs.directory.open(1)
    loop.train(run)


def records(directory, name="metrics"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def cross_entropy(model_path, rows):
    """transformers' loss of the completions alone, the mean over all their tokens, and the gradient's norm: float64."""
    from transformers import AutoModelForCausalLM

    model, losses, tokens = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64), [], 0
    for row in rows:
        prompt, completion = row["prompt_token_ids"], row["token_ids"]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        losses.append(model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss * len(completion))
        tokens += len(completion)
    loss = sum(losses) / tokens
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


@pytest.fixture(scope="module")
def alone(tree, tmp_path_factory):
    """The run directory of three steps in one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    pool.ranks(1, fine_tuned, with_run(tree, directory, 3))
    return directory


def test_the_loss_is_transformers_cross_entropy_on_what_the_rows_show(tree, alone):
    first, rows = records(alone)[0], parquet.read_table(alone / "rollouts" / "step_000001.parquet").to_pylist()
    alphabet = sorted_bytes()
    for row in rows:
        answer = SHOWN[row["prompt"]]
        assert row["prompt_token_ids"] == [257, *(alphabet[c] for c in row["prompt"]), 258, 257]
        assert row["token_ids"] == [*(alphabet["Ġ" if c == " " else c] for c in answer), 258]
        assert (row["text"], row["reward"], row["advantage"], row["finish_reason"]) == (answer, 1.0, 1.0, "stop")
        assert row["sampler_logprobs"] is None and row["near_boundary"] is None
    assert len({row["prompt"] for row in rows}) == 3
    loss, norm = cross_entropy(tree["model"]["path"], rows)
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert first["logprob"] == pytest.approx(-loss, rel=1e-5)
    assert first["completion_tokens"] == pytest.approx(sum(len(row["token_ids"]) for row in rows) / 3)


def sorted_bytes():
    from tokenizers import pre_tokenizers

    return {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def test_what_only_samples_have_is_not_recorded(alone):
    for line in records(alone):
        assert line.keys() == {
            "step", "lr", "loss", "grad_norm", "logprob", "entropy", "ratio", "clip_fraction", "completion_tokens",
        }  # fmt: skip
    for line in records(alone, "timings"):
        assert "sampling_tokens_per_s" not in line and "sample_s" not in line and line["training_tokens_per_s"] > 0


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tensor 2", "pipeline 2", "data 2"])
def test_a_layout_changes_no_number(tree, alone, ranks, tmp_path, layout):
    ranks(2, fine_tuned, with_run(tree, tmp_path / "run", 3, **layout))
    for ours, theirs in zip(records(tmp_path / "run"), records(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def whole_command(tree, fail_in_step=None):
    """The whole command on this rank; with `fail_in_step` it dies in that step."""
    real = collect.with_advantages

    def with_advantages(*args):
        if run_steps[0] + 1 == fail_in_step:
            raise KeyboardInterrupt
        run_steps[0] += 1
        return real(*args)

    run_steps = [0]
    with mock.patch.object(collect, "with_advantages", with_advantages):
        try:
            main.train(validate_recipe(tree))
        except KeyboardInterrupt:
            return "interrupted"
    return "done"


def test_an_interrupted_run_goes_on_bit_for_bit(tree, ranks, tmp_path):
    """It dies in step 4, one step after its last checkpoint, and goes on there with the row that would have come."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert ranks(2, whole_command, with_run(tree, straight, 5)) == ["done"] * 2
    again = with_run(tree, resumed, 5, save_every=2)
    assert ranks(2, whole_command, again, 4) == ["interrupted"] * 2
    assert ranks(2, whole_command, again) == ["done"] * 2
    for name in ("metrics.jsonl", *(f"rollouts/step_{step:06d}.parquet" for step in range(1, 6))):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (straight, resumed))
    assert all(weight.equal(others[name]) for name, weight in weights.items())


def test_held_out_problems_are_answered_by_the_policy_and_scored(tree, ranks, tmp_path):
    data = tree["data"] | {"heldout": 2}
    assert ranks(2, whole_command, with_run(tree | {"data": data}, tmp_path / "run", 2, tensor=2)) == ["done"] * 2
    assert [line["step"] for line in records(tmp_path / "run", "evaluations")] == [0, 2]
    prompts = {
        row["prompt"]
        for file in (tmp_path / "run" / "rollouts").iterdir()
        for row in parquet.read_table(file).to_pylist()
    }
    assert len(prompts) == 3  # of five; two are held out
