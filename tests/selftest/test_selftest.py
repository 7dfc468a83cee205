"""The brief table holds, and a reduction that is taken out of it is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_mega.selftest import main
from grpo_mega.selftest import ranks as on_rank
from grpo_mega.selftest.cases import parse
from grpo_mega.selftest.measure import answer
from grpo_mega.selftest.table import BOUNDS, Bounds, broken

ROOT = Path(__file__).resolve().parents[2]


def selftest(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "grpo_mega", "selftest", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_the_brief_table_holds():
    done = selftest("--json")
    answered = json.loads(done.stdout)
    assert done.returncode == 0, [broken(row, "fp32") for row in answered["rows"]]
    rows = answered["rows"]
    assert len(rows) >= 17 and answered["bounds"]["gradient"] == BOUNDS["fp32"].gradient == 2e-6
    assert all(row["drawn"] == 96 and len(row["gradients"]) > 30 for row in rows)
    assert any(max(row["gradients"].values()) > 1e-7 for row in rows), "nothing was compared"


@pytest.mark.timeout(300)
def test_bf16_has_the_same_distribution_and_the_same_noise():
    """Same tokens, log-probs apart by bf16's rounding; the same draws until a rounding turns one."""
    done = selftest("--json", "--dtype", "bf16", "--layouts", "rows32", "tp2-sp", "cp2")
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 0, [broken(row, "bf16") for row in rows]
    assert max(row["logprob"] for row in rows) > 1e-4, "nothing was rounded"
    assert all(row["same"] >= row["drawn"] // 4 for row in rows), "of other noise none in a hundred would be the same"


def test_a_row_out_of_bounds_ends_with_1_and_the_first_tensor(monkeypatch, capsys):
    monkeypatch.setitem(BOUNDS, "fp32", Bounds(1.0, 1.0, 0.0, 1.0, True))
    code = main.selftest(["full", "rows32"], world_size=None, everything=False, dtype="fp32", as_json=False)
    said = capsys.readouterr().out
    assert code == 1, said
    assert "1 of 2 layouts break; the first is rows32: gradient of model.embed_tokens.weight is off by " in said


def test_a_launchers_ranks_are_used():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "grpo_mega", "selftest"]
    done = subprocess.run(
        [*torchrun, "--layouts", "tp2", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert done.returncode == 0 and row["case"] == "tp2" and broken(row, "fp32") is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layouts", "tp3"], "parallel.tensor=3 does not divide the model's 8 attention heads"),
        (["--layouts", "tp2", "--world-size", "4"], "--layouts tp2 takes 2 ranks, and there are 4"),
        (["--world-size", "5"], "no layout of the table has 5 ranks; name some by --layouts, or use 1, 2, 4 or 8"),
    ],
)
def test_mistakes(arguments, sentence):
    done = selftest(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("grpo-mega: ") and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


# ---- taken out: what each kind of rank owes the others


def no_tensor_sum(patch):
    """The hidden gradient of the output layer stays this rank's part of the vocabulary."""
    from grpo_mega.parallel.head import Head

    def alone(self, grad, rows, hidden):
        return torch.zeros_like(hidden).index_copy_(0, rows, grad)

    patch(Head, "hidden_gradient", alone)


def no_context_gradient(patch):
    """Keys and values of other ranks' rows get no gradient from this rank's queries."""
    from grpo_mega.parallel import collectives

    patch(collectives, "reduce_scatter", lambda tensor, group: tensor[: len(tensor) // group.size()])


def no_data_sum(patch):
    from megatron.core.distributed import DistributedDataParallel

    patch(DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None)


def no_shared_embedding_sum(patch):
    """The first and the last stage's copies of a tied embedding go different ways."""
    from megatron.core.distributed import finalize_model_grads as module

    patch(sys.modules[module.__module__], "_allreduce_word_embedding_grads", lambda *_, **__: None)


def no_expert_exchange(patch):
    """Rows that went to other ranks' experts get no gradient back."""
    from megatron.core.tensor_parallel import mappings

    def backward(ctx, gradient):
        rows = len(gradient) if ctx.input_split_sizes is None else sum(ctx.input_split_sizes)
        return None, gradient.new_zeros(rows, *gradient.shape[1:]), None, None

    patch(mappings._AllToAll, "backward", staticmethod(backward))


MUTATIONS = {
    "tp2": (no_tensor_sum, "gradient of model."),
    "cp2": (no_context_gradient, "gradient of model."),
    "dp2": (no_data_sum, "gradient of model."),
    "moe-dp2-ep2": (no_expert_exchange, "gradient of model."),
    "pp2": (no_shared_embedding_sum, "gradient of model.embed_tokens.weight"),
}


def row_of(scratch, name, mutation):
    from unittest import mock

    from grpo_mega.parallel import mesh

    grid = mesh.initialize()
    case, patches = parse(name), []
    if mutation is not None:
        mutation(lambda owner, name, new: patches.append(mock.patch.object(owner, name, new)))
    for patch in patches:
        patch.start()
    try:
        (row,) = on_rank.rows_of([case], scratch, "fp32", grid)
    finally:
        for patch in patches:
            patch.stop()
    return row


def one_process(scratch):
    from grpo_mega.parallel import mesh

    grid = mesh.initialize()
    for name in ("rows1000", "moe"):
        case = parse(name)
        found = answer(case, on_rank.write_model(scratch / f"alone-{case.model}", case.model), "fp32", grid, None)
        torch.save(found, scratch / f"one-{case.model}-sequence-1-1.pt")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    from ranks import ranks

    folder = tmp_path_factory.mktemp("selftest")
    ranks(1, one_process, folder)
    return folder


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_reduction_is_named(ranks, scratch, name):
    mutation, words = MUTATIONS[name]
    assert broken(ranks(2, row_of, scratch, name, None)[0], "fp32") is None
    found = broken(ranks(2, row_of, scratch, name, mutation)[0], "fp32")
    assert found is not None and found.startswith(words), found
