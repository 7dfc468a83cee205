"""A reference with a layout of its own: the log-probs, the loss and the gradient of one on training's layout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from assembled import assembled

from grpo_mega.config import GrpoConfig, validate_recipe
from grpo_mega.data.advantages import with_advantages
from grpo_mega.errors import ConfigError
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer import main
from grpo_mega.trainer.batches import minibatches, with_logprobs
from grpo_mega.trainer.check import check_cheaply
from grpo_mega.trainer.heads import TokenHead
from grpo_mega.trainer.objective import objective_of
from grpo_mega.trainer.policy import Policy, Scorer
from grpo_mega.trainer.records import RunDirectory
from grpo_mega.trainer.reference import build_reference
from grpo_mega.types import Completion, Group, Prompt, Rollout, add_metrics

PAIRS = {  # world, `parallel`, the reference's own layout
    "TP2 PP2, TP4": (4, {"tensor": 2, "pipeline": 2}, {"tensor": 4}),  # more tensor ranks than key-value heads
    "DP4, TP2 PP2": (4, {}, {"tensor": 2, "pipeline": 2}),
    "TP2 DP2, DP4": (4, {"tensor": 2}, {"tensor": 1}),
    "SP2 CP2, PP2 DP2": (4, {"tensor": 2, "sequence": True, "context": 2}, {"pipeline": 2}),
    "PP2, CP2": (2, {"pipeline": 2}, {"context": 2}),
    "PP2 virtual 2, SP2 PP2": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"tensor": 2, "sequence": True, "pipeline": 2},
    ),
    "TP2, SP2": (2, {"tensor": 2}, {"tensor": 2, "sequence": True}),  # training's mesh
}
PROMPTS = 7


def length(text, answer, row):
    return len(text) % 3


def groups():
    """Prompts and completions of many lengths, drawn from sets of tokens: no two data ranks have alike."""
    generator = np.random.default_rng(5)
    for index in range(PROMPTS):
        prompt = Prompt(index, "", tuple(generator.integers(256, size=3 + 2 * index).tolist()))
        rollouts = []
        for count in generator.integers(1, 9, size=3):
            ids = tuple(generator.integers(256, size=count).tolist())
            kept = tuple(np.unique([i, *generator.integers(256, size=20)]).astype(np.int32) for i in ids)
            completion = Completion(ids, (-1.0,) * len(ids), "stop", kept=kept if index % 2 else None)
            rollouts.append(Rollout(completion, float(generator.normal())))
        yield with_advantages([Group(prompt, tuple(rollouts))], GrpoConfig())[0]


def recipe_of(folders, parallel, reference=None, **sections):
    return validate_recipe(
        {
            "model": {"path": str(folders[0])},
            "reference": {"path": str(folders[1]), **(reference or {})},
            "parallel": parallel,
            "data": {"jsonl": "unused"},
            "sampling": {"temperature": 0.7, "max_completion_tokens": 9},
            "grpo": {"group_size": 3, "kl_coef": 0.1},
            "batch": {"prompts_per_step": PROMPTS, "tokens_per_microbatch": 40},
            "run": {"directory": "unused"},
        }
        | sections
    )


# ---- on the ranks


def compared(folders, parallel, own, scratch):
    """Log-probs, loss and gradient with a reference of training's layout, of its own, and of its own and offloaded."""
    recipes = [recipe_of(folders, parallel, reference) for reference in (None, own, own | {"offload": True})]
    grid = mesh.initialize(**recipes[0].parallel.sizes)
    arch = read_architecture(folders[0])
    layers = layers_per_stage(arch, recipes[0].parallel.stages)
    with mock.patch.dict(DTYPES, fp32=torch.float64):
        references = [build_reference(recipe, grid) for recipe in recipes]
        model = build_model(arch, grid, recipes[0].parallel, dtype=torch.float64)
    policy = Policy(TokenHead(model, arch.vocab_size, grid, 0.7), recipes[0].optimizer, 1)
    everything = list(groups())
    positions = grid.share(PROMPTS)
    (batches,) = minibatches([everything[i] for i in positions], positions, recipes[1], grid, torch.float64)
    assert len(batches) > 1
    found, empty = [], offloaded(references[2])
    for reference in references:
        values = reference.logprobs(batches)
        metrics = policy.gradients(with_logprobs(batches, values, values), objective_of(recipes[1]))
        shares = collectives.gather_objects(metrics if grid.tensor.first else {}, grid.world.group)
        total = {name: value.value() for name, value in add_metrics(*shares).items()}
        gradient = assembled(model, arch, grid, layers, lambda parameter: parameter.main_grad, scratch / "gradients")
        found.append((values, total, gradient))
    assert empty and offloaded(references[2]) and not offloaded(references[1])
    trained = [batch.loss_weights != 0 for batch in batches]
    return grid.data.rank, grid.pipeline.last, trained, found


def offloaded(reference):
    sizes = {weight.untyped_storage().size() for weight in reference._scorer.model.parameters()}
    assert sizes == {0} or 0 not in sizes
    return sizes == {0}


def global_reads(folders, parallel, own):
    """Who of megatron asks parallel_state what, in build and forward of a model on a second mesh: "file: getter"."""
    from megatron.core import parallel_state

    getters = {f.__code__ for name, f in vars(parallel_state).items() if callable(f) and name.startswith("get_")}
    grid = mesh.initialize(**recipe_of(folders, parallel).parallel.sizes)
    layout = recipe_of(folders, parallel, own).reference.layout
    other = mesh.another_layout(grid, **layout.sizes)
    arch = read_architecture(folders[0])
    found = {"build": Counter(), "forward": Counter()}

    def watching(phase, work):
        def watch(frame, event, _):
            caller = frame.f_back
            if event == "call" and frame.f_code in getters and caller.f_code not in getters:
                while os.path.basename(caller.f_code.co_filename) in ("utils.py", "process_groups_config.py"):
                    caller = caller.f_back  # which only passes the question on
                found[phase][f"{os.path.basename(caller.f_code.co_filename)}: {frame.f_code.co_name}"] += 1

        sys.setprofile(watch)
        try:
            with other.active():
                return work()
        finally:
            sys.setprofile(None)

    (batches,) = minibatches(list(groups()), range(PROMPTS), recipe_of(folders, parallel, own), grid, torch.float32)
    model = watching("build", lambda: build_model(arch, other, layout, trainable=False))
    watching("forward", lambda: Scorer(TokenHead(model, arch.vocab_size, other, 1.0)).logprobs(batches))
    return {phase: set(counts) for phase, counts in found.items()}


def train(recipe):
    main.train(validate_recipe(recipe))


# ---- the tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Policy and reference."""
    base = tmp_path_factory.mktemp("reference")
    shape = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    return [
        tiny.make_model(base / name, num_key_value_heads=2, seed=seed, tied=seed == 0, **shape)
        for seed, name in enumerate(("policy", "reference"))
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_its_layout_changes_no_log_prob_no_loss_no_gradient(ranks, folders, tmp_path, name):
    world, parallel, own = PAIRS[name]
    by_rank = ranks(world, compared, folders, parallel, own, tmp_path)
    seen = {}
    for data, last, trained, ((plain, *_), (other, *_), (back, *_)) in by_rank:
        assert [value is None for value in (*plain, *other, *back)] == [not last] * (3 * len(plain))
        for index, mask in enumerate(trained if last else ()):
            assert plain[index].shape == mask.shape and (plain[index] != 0).equal(mask)
            torch.testing.assert_close(other[index], plain[index], rtol=0, atol=1e-10)
            assert other[index].equal(back[index]), "host memory changed something"
            seen[data, index] = plain[index]
    # a result that went to another would show
    assert all(not a.allclose(b, atol=0.1) for x, a in seen.items() for y, b in seen.items() if x < y and a.any())
    (_, loss, gradient), *others = by_rank[0][3]
    for _, metrics, gradients in others:
        assert metrics == pytest.approx(loss, rel=1e-9) and metrics["kl"] > 0.1
        for tensor, wanted in gradient.items():
            torch.testing.assert_close(gradients[tensor], wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("world", "parallel", "own"),
    [
        (4, {"tensor": 2, "pipeline": 2}, {"tensor": 4}),
        (4, {"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "pipeline": 2, "sequence": True}),
        (2, {"tensor": 2}, {"pipeline": 2}),
    ],
)
def test_what_megatron_reads_globally_is_what_active_says(ranks, folders, world, parallel, own):
    layers = "pipeline_parallel_layer_layout.py: "
    allowed = {
        "build": {
            layers + "get_pipeline_model_parallel_rank",
            layers + "get_virtual_pipeline_model_parallel_world_size",
        }
        | {"layers.py: get_gtp_weight_remat_group", "layers.py: get_expert_gtp_weight_remat_group"},
        "forward": {layers + "get_pipeline_model_parallel_rank"}
        | {layers + "get_virtual_pipeline_model_parallel_world_size", "layers.py: get_tensor_model_parallel_group"}
        | {"attention.py: get_tensor_model_parallel_group", "attention.py: get_tensor_model_parallel_rank"}
        | {"mappings.py: get_tensor_model_parallel_group"},  # asked by attention.py
    }
    for found in ranks(world, global_reads, folders, parallel, own):
        for phase, reads in found.items():
            assert reads <= allowed[phase], reads - allowed[phase]
            assert reads or phase == "build", "the watch saw nothing"


def test_a_run_with_another_layout_is_the_run(ranks, folders, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 6)))
    metrics = []
    for name, reference in {"plain": {}, "own": {"pipeline": 2, "offload": True}}.items():
        tree = {
            "model": {"path": str(folders[0])},
            "reference": reference | {"path": str(folders[1])},
            "data": {"jsonl": str(tmp_path / "data.jsonl"), "heldout": 0},
            "reward": {"function": f"{__name__}:length"},
            "sampling": {"max_completion_tokens": 5},
            "grpo": {"group_size": 3},
            "batch": {"prompts_per_step": 3},
            "optimizer": {"lr": 0.01},
            "run": {"directory": str(tmp_path / name), "num_steps": 3, "save_every": 0},
        }
        ranks(2, train, tree)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])
    RunDirectory(validate_recipe(tree | {"reference": {"tensor": 2, "path": str(folders[1])}})).check()  # may go on so
    assert len(metrics[0]) == 3
    for plain, own in zip(*metrics, strict=True):
        assert own == pytest.approx(plain, rel=1e-5, abs=1e-5) and own["kl"] > 0.1


# ---- mistakes

REFUSED = [
    ({"sequence": True}, {}, "reference.sequence=true needs reference.tensor > 1 (in a layout of its own an axis that"),
    ({"tensor": 2}, {"grpo": {"kl_coef": 0.0}}, "reference.tensor=2 would never be used with grpo.kl_coef=0; leave it"),
    ({"context": 1}, {"grpo": {"kl_coef": 0.0}}, "reference.context=1 would never be used with grpo.kl_coef=0; leave"),
    ({"offload": True}, {"grpo": {"kl_coef": 0.0}}, "reference.offload=true would never be used with grpo.kl_coef=0;"),
    ({"pipeline": 0}, {}, "reference.pipeline=0 should be greater than or equal to 1"),
    ({"tensor": 3}, {}, "reference.tensor=3 does not divide the model's 4 attention heads, 2 key-value heads and 32"),
    ({"pipeline": 8}, {}, "reference.pipeline=8 exceeds the model's 4 layers; use at most 4"),
    (
        {"tensor": 2, "pipeline": 2},
        {},
        "2 ranks do not divide into replicas of reference.tensor=2 x reference.pipeline=2 = 4 ranks; start 4 ranks or",
    ),
    (
        {"context": 4},
        {},
        "2 ranks do not divide into replicas of reference.tensor=1 x reference.pipeline=1 x reference.context=4 = 4 r",
    ),
]


@pytest.mark.parametrize(("reference", "sections", "sentence"), REFUSED)
def test_mistakes_are_refused_before_any_rank_waits(folders, reference, sections, sentence):
    with pytest.raises(ConfigError) as caught:
        tree = recipe_of(folders, {}).model_dump()
        tree["reference"] = reference  # the policy's first weights
        check_cheaply(validate_recipe(tree | {key: tree[key] | value for key, value in sections.items()}), 2)
    assert sentence in str(caught.value)


def test_rows_divide_by_both_layouts():
    for own, multiple in (
        ({"tensor": 4}, 1),
        ({"tensor": 4, "sequence": True}, 4),
        ({"context": 3}, 6),
        ({"tensor": 4, "sequence": True, "context": 3}, 24),
    ):
        layout = recipe_of(("policy", "reference"), {}, own).reference.layout
        assert layout.row_multiple == multiple
        assert layout.replica == math.prod(own.get(axis, 1) for axis in ("tensor", "context"))
    assert recipe_of(("policy", "reference"), {"tensor": 2}, {"offload": True}).reference.layout is None
