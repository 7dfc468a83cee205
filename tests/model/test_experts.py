"""Mixtures of experts: auxiliary losses, replayed routing, the norm that clips, checkpoints, and what is refused.

Log-probs, gradients and completions under every layout stand with the other models', in test_sharded and test_sampler.
The reference is transformers' MixtralForCausalLM in float64, differentiated by autograd, with the losses written out.
"""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import tiny
import torch
from built import SETTINGS, Layout, built, resumed, same, saved
from safetensors.torch import load_file
from sharded import choose, gradients_of, hugging_face, load_in_float64, loss_of, objective, whole

from grpo_mega.config import MoeConfig, validate_recipe
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import check_experts
from grpo_mega.model.families import read_architecture
from grpo_mega.model.names import shapes
from grpo_mega.parallel.mesh import check_world, temporary_groups
from grpo_mega.trainer.check import check_cheaply

MOE = MoeConfig(aux_loss_coef=0.3, z_loss_coef=0.05)
LAYOUTS = {
    1: (Layout(), Layout(recompute="full")),
    2: (
        Layout(tensor=2),
        Layout(tensor=2, expert=2, expert_tensor=1, recompute="full"),
        Layout(context=2, expert=2),
        Layout(data=2, expert=2),
        Layout(pipeline=2),
    ),
}


# ---- on the ranks


def with_losses(folder, layouts):
    """The gradients of each layout with both auxiliary losses."""
    found = []
    for layout in layouts:
        with temporary_groups():
            run = built(folder, layout, torch.float64, moe=MOE)
            run.policy.gradients(run.batches, objective)
            found.append({"gradients": hugging_face(run.policy.model, run.arch, run.place)})
            del run
    return found


def turn_routers(model):
    """Make the least likely experts the likeliest."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("router.weight", "mlp.gate.weight")):
                parameter.neg_()


def after_a_turn(folder, layouts):
    """Gradients once routers have turned since the log-probs: with replay and without; choices before and after."""
    return [{replays: turned(folder, layout, replays) for replays in (True, False)} for layout in layouts]


@temporary_groups()
def turned(folder, layout, replays):
    from grpo_mega.model.experts import TopRouter

    run = built(folder, layout, torch.float64, replays=replays)
    seen = []
    for module in run.policy.model.modules():
        if isinstance(module, TopRouter):
            module.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    run.policy.logprobs(run.batches)
    before = len(seen)
    turn_routers(run.policy.model)
    run.policy.gradients(run.batches, objective)
    assert all(bool(batch.routes) == replays for batch in run.batches)
    # full recompute runs a microbatch's routers again, last layer first
    same = [any(torch.equal(new, old) for old in seen[:before]) for new in seen[before:]]
    return {"gradients": hugging_face(run.policy.model, run.arch, run.place)}, same, before


def updated(folder, layouts, scratch):
    """The gradient norm of one update under each layout; folders of the weights before and after it."""
    return [update_of(folder, layout, scratch / f"{n} before", scratch / str(n)) for n, layout in enumerate(layouts)]


@temporary_groups()
def update_of(folder, layout, before, after):
    from grpo_mega.model import bridge

    run = built(folder, layout, torch.float32)
    run.policy.begin_step()
    bridge.export(run.policy.settled(), run.arch, run.mesh, run.layers, before)
    metrics = run.policy.update(run.batches, objective)
    bridge.export(run.policy.settled(), run.arch, run.mesh, run.layers, after)
    return metrics["grad_norm"].total if run.mesh.pipeline.last else None


# ---- in the parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mixture"
    return tiny.make_model(
        path, tied=False, num_hidden_layers=2, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    )


def by_transformers(folder, *, turn=False, forced=False, moe=None):
    """Gradients of the samples' loss; turn: with turned routers; forced: but the experts of the unturned ones."""
    model, scores, experts, given = load_in_float64(folder), [], [], None
    routers = [module for module in model.modules() if type(module).__name__ == "MixtralTopKRouter"]

    def watched(router, hidden):
        if given is not None:
            values, chosen = torch.nn.functional.linear(hidden.flatten(0, -2), router.weight), next(given)
            return values, values.gather(1, chosen).softmax(dim=1), chosen
        answer = choose(router, hidden)
        scores.append(answer[0])
        experts.append(answer[2])
        return answer

    for router in routers:
        router.forward = partial(watched, router)
    if forced:
        loss_of(model)
        given = iter(experts)
    if turn:
        turn_routers(model)
    loss = loss_of(model)
    if moe is not None:
        loss = loss + auxiliary(scores, len(routers), moe)
    loss.backward()
    return gradients_of(model)


def auxiliary(scores, layers, moe):
    """Both losses, from every sequence's and layer's scores: sequences 0, 1 are one microbatch, 2, 3 the other."""
    rows = sum(len(s) for s in scores[::layers])
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(layers):
        for pair in (0, 2):
            s = torch.cat([scores[pair * layers + layer], scores[(pair + 1) * layers + layer]])
            share = torch.zeros(4, dtype=torch.float64)
            for experts in s.topk(2).indices.tolist():
                for expert in experts:
                    share[expert] += 1 / (2 * len(s))
            balance = 4 * sum(share[e] * s.softmax(dim=1)[:, e].mean() for e in range(4))
            total = total + moe.aux_loss_coef * len(s) / rows * balance
            total = total + moe.z_loss_coef * (s.logsumexp(dim=1) ** 2).sum() / rows
    return total


def near(by_rank, wanted, tolerance=1e-10):
    """The largest error of any tensor, against its largest number."""
    found = whole(by_rank, wanted)
    return max(float((found[n] - w).abs().max() / w.abs().max()) for n, w in wanted.items()) <= tolerance


@pytest.mark.parametrize("world", [1, 2])
def test_auxiliary_losses_are_means_over_real_rows_under_every_layout(ranks, folder, world):
    wanted, plain = by_transformers(folder, moe=MOE), by_transformers(folder)
    by_rank = ranks(world, with_losses, folder, LAYOUTS[world], timeout=200)
    for n, layout in enumerate(LAYOUTS[world]):
        assert near([rank[n] for rank in by_rank], wanted), layout
    for name in wanted:  # both losses reach everything below the last layer's router, and change what they reach
        last = name.startswith(("lm_head", "model.norm")) or "layers.1.block_sparse_moe.experts" in name
        error = float((wanted[name] - plain[name]).abs().max() / plain[name].abs().max())
        assert error == 0 if last else error > 1e-3, name


@pytest.mark.parametrize("world", [1, 2])
def test_replayed_routing_is_that_of_the_old_log_probs(ranks, folder, world):
    replayed = by_transformers(folder, turn=True, forced=True)
    free = by_transformers(folder, turn=True)
    answers = ranks(world, after_a_turn, folder, LAYOUTS[world], timeout=200)
    for n, layout in enumerate(LAYOUTS[world]):
        for replays, wanted, other in ((True, replayed, free), (False, free, replayed)):
            by_rank = [rank[n][replays][0] for rank in answers]
            assert near(by_rank, wanted) and not near(by_rank, other, 1e-3), (layout, replays)
            for rank in answers:
                _, same, before = rank[n][replays]
                again = 2 if layout.recompute == "full" else 1
                assert len(same) == again * before and (all(same) if replays else not any(same)), layout


def test_the_norm_that_clips_and_the_update_are_the_same_under_every_layout(ranks, folder, tmp_path):
    wanted = math.sqrt(sum(float(g.square().sum()) for g in by_transformers(folder).values()))
    assert wanted > 2 * SETTINGS["clip_grad"]
    layouts = {
        1: [Layout(), Layout(distributed=True)],
        2: [
            Layout(data=2, expert=2),
            Layout(data=2, expert=2, distributed=True),
            Layout(data=2, expert_tensor=2),
            Layout(tensor=2, expert_tensor=1),
            Layout(tensor=2, expert_tensor=1, distributed=True),
            Layout(tensor=2, expert=2, expert_tensor=1),
            Layout(pipeline=2),
        ],
        4: [Layout(tensor=2, data=2, expert=2, distributed=True), Layout(pipeline=2, data=2, expert=2)],
    }
    for world, several in layouts.items():
        by_rank = ranks(world, updated, folder, several, tmp_path / str(world), timeout=200)
        for n, layout in enumerate(several):
            norms = [rank[n] for rank in by_rank if rank[n] is not None]
            assert norms == pytest.approx([wanted] * len(norms), rel=2e-6), layout
            same(tmp_path / str(world) / str(n), tmp_path / "1" / "0", layout)
            same(tmp_path / str(world) / f"{n} before", folder, layout, tolerance=0)  # read and written bit by bit
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "1" / "0"))
    assert all((before[name] - after[name]).abs().max() > 1e-5 for name in before)


def survivors():
    """Layers that are still in memory once their model's last user has gone."""
    from grpo_mega.model.experts import MixtureLayer

    gc.collect()
    return sum(isinstance(thing, MixtureLayer) for thing in gc.get_objects())


def test_a_model_that_has_trained_goes_when_nobody_has_it(ranks, folder):
    ranks(1, with_losses, folder, [Layout()], timeout=100)
    assert ranks(1, survivors) == [0]


@pytest.mark.parametrize("distributed", [False, True])
def test_another_layout_resumes(ranks, folder, tmp_path, distributed):
    """Saved with experts on two data ranks; gone on with on one rank, on two tensor ranks, and on two of each."""
    ranks(2, saved, folder, Layout(data=2, expert=2, distributed=distributed), tmp_path, timeout=200)
    ranks(1, resumed, folder, Layout(), None, tmp_path / "whole", timeout=100)
    layouts = [Layout(), Layout(tensor=2, expert=2, expert_tensor=1), Layout(tensor=2, expert_tensor=2)]
    for n, layout in enumerate(layouts):
        layout = Layout(**{**vars(layout), "distributed": distributed})
        ranks(layout.tensor, resumed, folder, layout, tmp_path, tmp_path / str(n), timeout=100)
        same(tmp_path / str(n), tmp_path / "whole", layout)


@pytest.mark.filterwarnings("ignore")  # megatron-core, imported here without the stand-in
@pytest.mark.parametrize(("expert", "slices"), [(1, 1), (2, 1), (4, 2), (2, 4)])
def test_every_element_of_an_expert_has_exactly_one_home(folder, expert, slices):
    from grpo_mega.model import bridge

    arch = read_architecture(folder)
    homes = {key: torch.zeros(shape, dtype=torch.int) for key, shape in shapes(arch).items()}
    for rank in range(expert * slices):
        place = bridge.Place(0, 1, 0, 1, (2,), rank // slices, expert, rank % slices, slices)
        for _, parts in bridge.pieces(arch, place):
            for piece in parts:
                homes[piece.name].narrow(piece.dim, piece.source, piece.length).add_(1)
    for key, count in homes.items():
        assert count.unique().tolist() == [1 if ".experts." in key else expert * slices], key


# ---- what is refused


def test_layouts_that_cannot_divide_the_experts(folder, tmp_path):
    arch = read_architecture(folder)
    assert (arch.num_experts, arch.experts_per_token, arch.expert_ffn_size) == (4, 2, 32)
    check_experts(arch, tensor=2, expert=4, expert_tensor=None)
    with pytest.raises(
        ConfigError, match=r"parallel.expert=3 does not divide the model's 4 experts; use expert in \[1,"
    ):
        check_experts(arch, 1, 3, None)
    with pytest.raises(
        ConfigError, match=r"expert_tensor=6 does not divide an expert's 32 feed-forward channels; use 2"
    ):
        check_experts(arch, 1, 1, 6)
    dense = read_architecture(tiny.make_model(tmp_path / "dense", num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"parallel.expert=2 divides experts, .* is a LlamaForCausalLM, which has"):
        check_experts(dense, 1, 2, None)


def test_worlds_that_do_not_divide_into_expert_ranks():
    check_world(4, tensor=2, expert=4, expert_tensor=1)
    rule = r"the 4 ranks of a pipeline stage do not divide into parallel.expert=4 x parallel.expert_tensor=2 = 8 ranks"
    with pytest.raises(ConfigError, match=rule + r"; use parallel.expert in \[1, 2\], or start 16 ranks or a multiple"):
        check_world(8, tensor=2, pipeline=2, expert=4)
    with pytest.raises(ConfigError, match=r"sampling.expert_tensor must divide 2, or start 3 ranks or a multiple"):
        check_world(2, expert_tensor=3, section="sampling")


@pytest.mark.parametrize(
    ("mixture", "sections", "words"),
    [
        (
            True,
            {"parallel": {"tensor": 2}},
            "parallel.tensor=2 without parallel.sequence .* set parallel.sequence=true",
        ),
        (
            False,
            {"moe": {"z_loss_coef": 0.1}},
            "moe.z_loss_coef=0.1 is about a mixture .* LlamaForCausalLM, which has no",
        ),
        (False, {"parallel": {"expert": 2}}, "parallel.expert=2 divides experts"),
        (True, {"sampling": {"expert": 3}}, "sampling.expert=3 does not divide the model's 4 experts"),
        (True, {"moe": {"routing_replay": True}}, "moe.routing_replay=true would never be used"),
        (True, {"moe": {"capacity_factor": 1.0}}, "moe.capacity_factor"),
    ],
)
def test_recipes_that_are_refused(folder, tmp_path, mixture, sections, words):
    path = folder if mixture else tiny.make_model(tmp_path / "dense", num_hidden_layers=1)
    tree = {"model": {"path": str(path)}, "data": {"jsonl": "x", "heldout": 0}, "run": {"directory": "y"}}
    with pytest.raises(ConfigError, match=words):
        check_cheaply(validate_recipe({**tree, **sections}), 4)
