"""DeepSeek-V2 and V3: the rules of their routers, gradients through latent attention and shared experts under every
layout, checkpoints of models whose layers differ, 8-bit blocks, and what is refused.

Log-probs and bits stand with the other families', in test_families, sampling in test_sampler. The reference is
transformers in float64, differentiated by autograd, its routers written out a row at a time.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import tiny
import torch
from built import Layout, built, resumed, same, saved
from families import make_family
from safetensors.torch import load_file, save_file
from sharded import gradients_of, hugging_face, load_in_float64, loss_of, objective, whole

from grpo_mega.config import MoeConfig
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import check_experts, check_layout
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats.hugging_face import Folder
from grpo_mega.model.routing import Router
from grpo_mega.parallel.mesh import initialize, temporary_groups

MOE = MoeConfig(aux_loss_coef=0.3, z_loss_coef=0.05)
V3, DENSE, V2, LITE = "deepseek_v3", "dense", "deepseek_v2", "deepseek_v2-lite"
LAYOUTS = {
    1: [(V3, Layout()), (V3, Layout(recompute="full")), (V3, Layout(recompute="selective")), (V2, Layout())],
    2: [
        (V3, Layout(tensor=2)),
        (V3, Layout(tensor=2, expert=2, expert_tensor=1, recompute="full")),
        (V3, Layout(pipeline=2)),
        (V3, Layout(context=2, expert=2)),
        (V3, Layout(data=2, expert=2, recompute="selective")),
        (DENSE, Layout(tensor=2, sequence=False)),  # a mixture on several tensor ranks wants sequence parallelism
        (V2, Layout(tensor=2)),
        (LITE, Layout(tensor=2)),
    ],
}


# ---- on the ranks


def gradients(folders, layouts, moe=None):
    """The gradients of each layout in float64, of microbatches of which one shares a prompt's rows."""
    return [gradients_under(folders[name], layout, moe) for name, layout in layouts]


@temporary_groups()
def gradients_under(folder, layout, moe):
    run = built(folder, layout, torch.float64, moe=moe, shared=moe is None)
    run.policy.gradients(run.batches, objective)
    return {"gradients": hugging_face(run.policy.model, run.arch, run.place)}


@temporary_groups()
def replayed(folder, layout):
    """How many routers chose, and whether each chose as before, once they have turned."""
    from grpo_mega.model.experts import TopRouter

    run, seen = built(folder, layout, torch.float64, replays=True), []
    routers = [module for module in run.policy.model.modules() if isinstance(module, TopRouter)]
    for router in routers:
        router.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    run.policy.logprobs(run.batches)
    before = list(seen)
    with torch.no_grad():
        for router in routers:
            router.weight.neg_()
    run.policy.gradients(run.batches, objective)
    return len(before), [any(torch.equal(new, old) for old in before) for new in seen[len(before) :]]


@temporary_groups()
def copied(folder, destination):
    """A bf16 model, and its bf16 copy on other ranks, in folders."""
    from grpo_mega.config import ParallelConfig
    from grpo_mega.model import bridge
    from grpo_mega.model.build import build_model
    from grpo_mega.model.copy import WeightCopy
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.parallel.mesh import another_layout

    arch, layouts = read_architecture(folder), (ParallelConfig(pipeline=2), ParallelConfig(tensor=2))
    mesh = initialize(**layouts[0].sizes)
    other = another_layout(mesh, **layouts[1].sizes)
    model = build_model(arch, mesh, layouts[0], dtype=torch.bfloat16)
    with other.active():
        target = build_model(arch, other, layouts[1], dtype=torch.bfloat16, loaded=False)
    layers = layers_per_stage(arch, 2)
    WeightCopy(arch, (model, mesh, layers), (target, other, (3,))).refresh()
    bridge.export(model, arch, mesh, layers, destination / "model")
    with other.active():
        bridge.export(target, arch, other, (3,), destination / "copy")


@temporary_groups()
def exported(folder, destination):
    from grpo_mega.config import ParallelConfig
    from grpo_mega.model import bridge
    from grpo_mega.model.build import build_model

    arch, parallel = read_architecture(folder), ParallelConfig(tensor=2)
    mesh = initialize(**parallel.sizes)
    bridge.export(build_model(arch, mesh, parallel), arch, mesh, (arch.num_layers,), destination)


# ---- in the parent: routers


def logit(*scores):
    return torch.tensor([[math.log(s / (1 - s)) for s in scores]], dtype=torch.float64)


def chosen_and_weights(logits, count, rule, bias=None):
    from grpo_mega.model.experts import choose, weigh

    chosen = choose(logits, count, rule, bias)
    weights = weigh(logits, chosen, rule)
    return dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))


@pytest.mark.filterwarnings("ignore")  # megatron-core, imported here without the stand-in
def test_a_v3_router_chooses_with_bias_and_weighs_without():
    """Scores .9 .1 | .6 .5 | .7 .2; with bias .68 .1 | .6 .5 | .7 .65: the sums of two are .78, 1.1, 1.35."""
    logits, bias = logit(0.9, 0.1, 0.6, 0.5, 0.7, 0.2), torch.tensor([-0.22, 0.0, 0.0, 0.0, 0.0, 0.45])
    rule = Router("sigmoid", scale=2.5, biased=True, groups=3, top_groups=2, group_score="two")
    found = chosen_and_weights(logits, 2, rule, bias)
    assert list(found) == [4, 5] and found == pytest.approx({4: 2.5 * 0.7 / 0.9, 5: 2.5 * 0.2 / 0.9})
    ungrouped = chosen_and_weights(logits, 2, Router("sigmoid", biased=True, normalised=False), bias)
    assert list(ungrouped) == [4, 0] and ungrouped == pytest.approx({4: 0.7, 0: 0.9})
    unbiased = chosen_and_weights(logits, 2, Router("sigmoid", groups=3, top_groups=1, group_score="two"))
    assert list(unbiased) == [2, 3] and unbiased == pytest.approx({2: 6 / 11, 3: 5 / 11})


@pytest.mark.filterwarnings("ignore")
def test_a_v2_router_stays_within_the_groups_of_the_highest_scores():
    """Probabilities .30 .02 | .05 .25 | .20 .18: the groups' highest are .30, .25, .20."""
    logits = torch.tensor([[0.30, 0.02, 0.05, 0.25, 0.20, 0.18]], dtype=torch.float64).log() + 7
    rule = Router(normalised=False, scale=16.0, groups=3, top_groups=2)
    assert chosen_and_weights(logits, 3, rule) == pytest.approx({0: 4.8, 3: 4.0, 2: 0.8})
    assert chosen_and_weights(logits, 3, Router(normalised=False)) == pytest.approx({0: 0.3, 3: 0.25, 4: 0.2})
    mixtral = chosen_and_weights(logits, 2, Router())
    assert mixtral == pytest.approx({0: 30 / 55, 3: 25 / 55})
    assert list(mixtral.values()) == torch.softmax(logits[:, [0, 3]], dim=1)[0].tolist()  # to the bit


# ---- in the parent: the model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("deepseek")
    made = {name: make_family(root / name, name) for name in (V3, V2, LITE)}
    return made | {DENSE: make_family(root / DENSE, V3, first_k_dense_replace=3)}


def by_transformers(folder, moe=None):
    """Gradients of the samples' loss."""
    model, seen = load_in_float64(folder), []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopkRouter")]
    for router in routers:
        router.forward = partial(routed, router, seen)
    with turning_in_float64(model) if "V2" in type(model).__name__ else nullcontext():
        loss = loss_of(model)
    if moe is not None:
        loss = loss + auxiliary(seen, len(routers), moe)
    loss.backward()
    return gradients_of(model)


def routed(router, seen, hidden):
    """(logits, weights, experts) by transformers' rules, a row at a time."""
    logits = torch.nn.functional.linear(hidden.flatten(0, -2), router.weight)
    biased = hasattr(router, "e_score_correction_bias")
    scores = logits.sigmoid() if biased else logits.softmax(dim=1)
    ranked = scores + router.e_score_correction_bias if biased else scores
    groups, top = router.num_group or 1, router.topk_group or 1
    experts = torch.tensor([picked(row, router.top_k, groups, top, 2 if biased else 1) for row in ranked.tolist()])
    weights = scores.gather(1, experts)
    if biased:
        weights = weights / weights.sum(dim=1, keepdim=True)
    seen.append((logits, experts))
    return logits, weights * router.routed_scaling_factor, experts


def picked(row, count, groups, top, summed):
    size = len(row) // groups
    runs = [range(start, start + size) for start in range(0, len(row), size)]
    worth = lambda run: sum(sorted((row[e] for e in run), reverse=True)[:summed])  # noqa: E731
    kept = [expert for run in sorted(runs, key=worth, reverse=True)[:top] for expert in run]
    return sorted(kept, key=lambda e: row[e], reverse=True)[:count]


@contextmanager
def turning_in_float64(model):
    """transformers turns V2's queries and keys in float32, by torch.polar, whose float32 cosines are others."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

    def turns(_, positions):
        angles = positions[..., None].float() * model.model.rotary_emb.inv_freq.float()
        return torch.complex(angles.cos(), angles.sin())

    def exact(queries, keys, turns):
        pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns.unsqueeze(1) for x in (queries, keys))
        return [torch.view_as_real(x).flatten(3) for x in pairs]

    model.model.rotary_emb.forward = turns
    kept, theirs.apply_rotary_emb = theirs.apply_rotary_emb, exact
    try:
        yield
    finally:
        theirs.apply_rotary_emb = kept


def auxiliary(seen, layers, moe):
    """Both losses from every sequence's and layer's logits and choices: sequences 0, 1 are one microbatch, 2, 3 the
    other; a row's scores are divided by their sum."""
    rows, total = sum(len(logits) for logits, _ in seen[::layers]), torch.zeros((), dtype=torch.float64)
    for layer in range(layers):
        for pair in (0, 2):
            logits, experts = (torch.cat(x) for x in zip(*seen[pair * layers + layer :: layers][:2], strict=True))
            scores = logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True)
            share = torch.bincount(experts.flatten(), minlength=8).double() / experts.numel()
            total = total + moe.aux_loss_coef * 8 * (share * scores.sum(dim=0)).sum() / rows
            total = total + moe.z_loss_coef * (logits.logsumexp(dim=1) ** 2).sum() / rows
    return total


def assert_near(by_rank, wanted, what, tolerance=1e-10):
    found = whole(by_rank, wanted)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-4, f"{name}: nothing to compare"
        error = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert error <= tolerance, f"{what}: gradient of {name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def references(folders):
    return {name: by_transformers(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_no_layout_changes_a_gradient(ranks, folders, references, world):
    by_rank = ranks(world, gradients, folders, LAYOUTS[world], timeout=200)
    for n, (name, layout) in enumerate(LAYOUTS[world]):
        assert_near([rank[n] for rank in by_rank], references[name], (name, layout))


def test_auxiliary_losses_count_scores_over_their_sum(ranks, folders):
    layouts = [(V3, Layout(tensor=2)), (V3, Layout(pipeline=2))]
    wanted = by_transformers(folders[V3], MOE)
    by_rank = ranks(2, gradients, folders, layouts, MOE, timeout=100)
    for n, layout in enumerate(layouts):
        assert_near([rank[n] for rank in by_rank], wanted, layout)


def test_routing_is_replayed_where_only_some_layers_are_mixtures(ranks, folders):
    for count, same_choice in ranks(2, replayed, folders[V3], Layout(pipeline=2), timeout=100):
        assert count and len(same_choice) == count and all(same_choice)


def test_another_layout_resumes(ranks, folders, tmp_path):
    """Layers differ, so that a checkpoint must name tensors by layer; and nothing has moved the experts' bias."""
    ranks(2, saved, folders[V3], Layout(tensor=2, distributed=True), tmp_path, timeout=100)
    ranks(1, resumed, folders[V3], Layout(), None, tmp_path / "whole", timeout=100)
    layouts = {"pp": Layout(pipeline=2, distributed=True), "ep": Layout(data=2, expert=2, distributed=True)}
    for name, layout in layouts.items():
        ranks(2, resumed, folders[V3], layout, tmp_path, tmp_path / name, timeout=100)
        same(tmp_path / name, tmp_path / "whole", layout)
    before, after = (load_file(f / "model.safetensors") for f in (folders[V3], tmp_path / "whole"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.endswith("e_score_correction_bias"), name


def test_the_bias_is_float32_in_a_bf16_model_and_in_its_copy(ranks, folders, tmp_path):
    ranks(2, copied, folders[V3], tmp_path, timeout=100)
    original, model, copy = (
        load_file(p / "model.safetensors") for p in (folders[V3], tmp_path / "model", tmp_path / "copy")
    )
    for name, tensor in original.items():
        biased = name.endswith("e_score_correction_bias")
        wanted = tensor if biased else tensor.bfloat16()
        assert torch.equal(model[name], wanted) and torch.equal(copy[name], wanted), name
        assert model[name].dtype == wanted.dtype and (not biased or not torch.equal(tensor, tensor.bfloat16().float()))


# ---- in the parent: folders


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A V3 folder of odd sizes in 8-bit blocks, with a layer that predicts a further token; what it means by name."""
    path = make_family(tmp_path_factory.mktemp("blocks") / "v3", V3, hidden_size=150, intermediate_size=134)
    tensors, wanted = load_file(path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for name in list(tensors):
        weight = tensors[name]
        if "_proj" in name:
            eights = (weight * 20).to(torch.float8_e4m3fn)
            scales = 0.01 + torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128), generator=generator)
            tensors[name], tensors[name + "_scale_inv"] = eights, scales
            rows = [
                torch.cat(
                    [row[start : start + 128] * scales[i // 128, start // 128] for start in range(0, len(row), 128)]
                )
                for i, row in enumerate(eights.float())
            ]
            wanted[name] = torch.stack(rows).bfloat16()
        else:
            wanted[name] = weight
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(150, 300)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert config["num_nextn_predict_layers"] == 1
    (path / "config.json").write_text(json.dumps(config))
    return path, wanted


def test_eight_bit_blocks_are_read_as_weight_times_scale(blocks):
    path, wanted = blocks
    folder = Folder(read_architecture(path))
    folder.check()
    assert list(folder.dropped()) == ["model.layers.3.eh_proj.weight"]
    name = "model.layers.0.mlp.gate_proj.weight"  # 134 x 150: two blocks each way
    assert folder.slice(name).get_dtype() == "F8_E4M3" and folder.dtype(name) == torch.bfloat16
    for dim, start, length in ((0, 0, None), (1, 0, None), (0, 100, 34), (1, 127, 23), (0, 130, 3), (1, 140, 1)):
        length = length or wanted[name].shape[dim]
        found = folder.read(name, dim, start, length)
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted[name].narrow(dim, start, length))


def test_what_is_written_is_whole_and_promises_no_more(ranks, blocks, tmp_path):
    path, wanted = blocks
    ranks(2, exported, path, tmp_path / "out", timeout=100)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and "quantization_config" not in config
    Folder(read_architecture(tmp_path / "out")).check()


def test_a_layer_that_config_does_not_announce_is_refused(folders, tmp_path):
    tensors = load_file(folders[V3] / "model.safetensors") | {"model.layers.4.eh_proj.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[V3] / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"does not account for, the first is model.layers.4.eh_proj.weight"):
        Folder(read_architecture(tmp_path)).check()


def test_yarn_as_config_json_of_the_publisher_has_it(folders):
    raw = json.loads((folders[V3] / "config.json").read_text())
    arch = architecture_of(raw, folders[V3])
    assert arch.query_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    theirs = {k: v for k, v in raw["rope_parameters"].items() if k not in ("rope_type", "rope_theta")} | {
        "type": "yarn"
    }
    published = {k: v for k, v in raw.items() if k != "rope_parameters"} | {"rope_scaling": theirs, "rope_theta": 10000}
    from grpo_mega.model.rotary import rope_inverse_frequencies

    other = architecture_of(published, folders[V3])
    (mine, factor), (frequencies, theirs_factor) = map(rope_inverse_frequencies, (arch, other))
    assert other.query_scale == arch.query_scale and torch.equal(mine, frequencies)
    assert factor == theirs_factor == pytest.approx((0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (V3, {"attention_bias": True}, "attention_bias=true; supported: matrices without biases"),
        (V3, {"topk_method": "greedy"}, "topk_method='greedy'; supported: noaux_tc"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax'; supported: sigmoid"),
        (
            V3,
            {"n_group": 8},
            "n_group=8, topk_group=1 with n_routed_experts=8, num_experts_per_tok=3; supported: groups",
        ),
        (V3, {"n_group": 3}, "n_group=3, .* supported: groups of equally many"),
        (V3, {"v_head_dim": 17}, "v_head_dim=17; supported: at most the 16 dimensions of a key"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'; supported: greedy, group_limited_greedy"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=true; supported: false"),
    ],
)
def test_configurations_that_are_refused(folders, name, change, words):
    raw = json.loads((folders[name] / "config.json").read_text())
    with pytest.raises(ConfigError, match=words):
        architecture_of(raw | change, folders[name])


def test_which_layers_are_mixtures_and_what_tensor_ranks_divide(folders):
    raw = json.loads((folders[V3] / "config.json").read_text())
    arch = architecture_of(raw | {"num_hidden_layers": 6, "moe_layer_freq": 2}, folders[V3])
    assert arch.mixtures == (False, False, True, False, True, False)
    assert arch.vocab_size == tiny.VOCABULARY and arch.size("kv_up") == 6 * 18 and arch.size("context") == 6 * 8
    check_layout(arch, 2, 1)
    check_experts(arch, 2, 4, 1)
    rule = "parallel.tensor=3 does not divide the model's 6 attention heads and 72 feed-forward channels and 20 shared "
    with pytest.raises(ConfigError, match=rule + r"experts' feed-forward channels; use tensor in \[1, 2\]"):
        check_layout(arch, 3, 1)
