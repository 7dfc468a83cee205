"""However the model is cut, log-probs and the gradient of every parameter are those of transformers in one process.

The reference is transformers' LlamaForCausalLM or MixtralForCausalLM in float64, one sequence at a time, differentiated
by autograd. Against it stand packed microbatches (one of them a group that shares its prompt's rows) under every kind
of layout, each rank's gradients put back under their Hugging Face names by the bridge's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from sharded import (
    TEMPERATURE,
    gradients_of,
    hugging_face,
    load_in_float64,
    objective,
    samples,
    token_loss,
    whole,
)

from grpo_mega.config import OptimizerConfig, ParallelConfig
from grpo_mega.data.packing import pack
from grpo_mega.parallel.mesh import initialize, temporary_groups

ROWS = 32  # of a microbatch; two of them: 1 / 64 is exact in megatron's float32 scale
MODELS = {  # 12 query heads, 5 layers
    "tied": {"tied": True},
    "untied": {"tied": False},
    "few": {"tied": False, "num_key_value_heads": 2},  # fewer key-value heads than tensor ranks
    "mixture": {"tied": False, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}


@dataclass(frozen=True)
class Layout:
    model: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    stages: tuple[int, ...] | None = None
    virtual: int = 1
    context: int = 1
    overlap: bool = False
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        axes = f"{self.model}-tp{self.tensor}-pp{self.pipeline}x{self.virtual}-cp{self.context}-dp{self.data}"
        if self.model == "mixture":
            axes += f"-ep{self.expert}-etp{self.expert_tensor or self.tensor}"
        return axes + "-sequence" * self.sequence + f"-{self.recompute}" + "-overlap" * self.overlap


LAYOUTS = (
    Layout("tied"),
    Layout("untied", recompute="full"),
    Layout("few"),
    Layout("tied", tensor=2),
    Layout("untied", tensor=2, sequence=True),
    Layout("tied", tensor=2, sequence=True),
    Layout("tied", pipeline=2),
    Layout("untied", pipeline=2, stages=(4, 1)),
    Layout("tied", data=2),
    Layout("tied", tensor=3),
    Layout("untied", tensor=3),
    Layout("tied", pipeline=3, stages=(1, 3, 1)),
    Layout("few", tensor=4),
    Layout("few", tensor=4, sequence=True, recompute="full"),
    Layout("tied", tensor=2, pipeline=2),
    Layout("untied", tensor=2, pipeline=2, sequence=True),
    Layout("tied", pipeline=2, data=2, recompute="full"),
    Layout("few", tensor=2, data=2),
    Layout("untied", recompute="selective"),
    Layout("tied", data=2, overlap=True),
    Layout("tied", context=2),
    Layout("untied", context=2, recompute="selective"),
    Layout("tied", pipeline=2, virtual=2),
    Layout("untied", pipeline=2, virtual=2, stages=(1, 2, 1, 1), recompute="full"),
    Layout("few", context=4),
    Layout("tied", tensor=2, context=2, sequence=True),
    Layout("untied", pipeline=2, context=2, recompute="full"),
    Layout("tied", pipeline=2, virtual=2, context=2, overlap=True),
    Layout("untied", tensor=2, pipeline=2, virtual=2, sequence=True),
    Layout("mixture"),
    Layout("mixture", recompute="full"),
    Layout("mixture", tensor=2, sequence=True),
    Layout("mixture", tensor=2, sequence=True, expert_tensor=1),
    Layout("mixture", tensor=2, sequence=True, expert=2, expert_tensor=1, recompute="full"),
    Layout("mixture", data=2),
    Layout("mixture", data=2, expert=2),
    Layout("mixture", data=2, expert=2, recompute="full", overlap=True),
    Layout("mixture", data=2, expert_tensor=2),
    Layout("mixture", context=2, expert=2),
    Layout("mixture", tensor=2, data=2, sequence=True, expert=2),
    Layout("mixture", tensor=2, data=2, sequence=True, expert=4, expert_tensor=1),
    Layout("mixture", tensor=2, data=2, sequence=True, expert=2, expert_tensor=1, recompute="full"),
    Layout("mixture", tensor=2, context=2, sequence=True, expert=2),
    Layout("mixture", pipeline=2, data=2, expert=2),
    Layout("mixture", pipeline=2, virtual=2, context=2, expert=2, recompute="full"),
    Layout("mixture", context=2, data=2, expert=4),
    Layout("mixture", context=2, data=2, expert=2, expert_tensor=2),
)


# ---- on the ranks


def answers(folders, layouts, dtype):
    """What this rank knows of each layout: log-probs, loss, and its gradients as (name, dim, source, values)."""
    return [answer(folders[layout.model], layout, dtype) for layout in layouts]


@temporary_groups()
def answer(folder, layout, dtype):
    from megatron.core import parallel_state

    from grpo_mega.model.bridge import Place
    from grpo_mega.model.build import build_model
    from grpo_mega.model.families import read_architecture
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Policy

    parallel_state.destroy_model_parallel()  # of the layout before
    parallel = ParallelConfig(
        tensor=layout.tensor, pipeline=layout.pipeline, virtual_pipeline=layout.virtual, context=layout.context,
        sequence=layout.sequence, pipeline_layout=layout.stages, expert=layout.expert,
        expert_tensor=layout.expert_tensor,
    )  # fmt: skip
    mesh = initialize(**parallel.sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, parallel, dtype=dtype, recompute=layout.recompute)
    policy = Policy(
        TokenHead(model, arch.vocab_size, mesh, TEMPERATURE), OptimizerConfig(), num_steps=1, overlap=layout.overlap
    )

    s = samples()
    batches = [
        pack(bundles, ROWS, scale=2 * ROWS, dtype=dtype, device=mesh.device) for bundles in ([s[:2]], [s[2:3], s[3:]])
    ]
    mine = batches[mesh.data.rank :: mesh.data.size]
    logprobs = policy.logprobs(mine)
    policy.gradients(mine, objective)  # twice: the buffers must be emptied in between
    metrics = policy.gradients(mine, objective)
    trained = [lp[b.loss_weights != 0].double() for lp, b in zip(logprobs, mine, strict=True) if lp is not None]
    place = Place.of(mesh, layers_per_stage(arch, parallel.stages, layout.stages))
    loss = (float(metrics["loss"].total), metrics["loss"].count) if mesh.pipeline.last else None
    return {"data": mesh.data.rank, "logprobs": trained, "loss": loss, "gradients": hugging_face(model, arch, place)}


# ---- in the parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.make_model(root / name, **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def references(folders):
    """{model: (log-probs of each microbatch, loss, {name: gradient})} by transformers in float64."""
    return {name: by_transformers(folder) for name, folder in folders.items()}


def by_transformers(folder):
    model = load_in_float64(folder)
    logprobs, loss = [], torch.zeros((), dtype=torch.float64)
    for sample in samples():
        tokens = torch.tensor(sample.token_ids)
        logp = torch.log_softmax(model(tokens[None, :-1]).logits[0] / TEMPERATURE, dim=1)[sample.prompt_tokens - 1 :]
        logprobs.append(logp.gather(1, tokens[sample.prompt_tokens :, None])[:, 0])
        coefficients = torch.tensor(sample.sampler_logprobs[sample.prompt_tokens :], dtype=torch.float64)
        loss = loss + token_loss(
            logprobs[-1], -(logp.exp() * logp).sum(dim=1), sample.weight, sample.advantage, coefficients
        )
    loss.backward()
    pairs = [torch.cat(logprobs[i : i + 2]).detach() for i in (0, 2)]
    return pairs, loss.item(), gradients_of(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_layout_changes_a_logprob_or_a_gradient(ranks, folders, references, world, dtype, tolerance):
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    by_rank = ranks(world, answers, folders, layouts, dtype, timeout=150)
    for n, layout in enumerate(layouts):
        check([rank[n] for rank in by_rank], layout, references[layout.model], tolerance)


def check(by_rank, layout, reference, tolerance):
    logprobs, loss, gradients = reference
    for rank in by_rank:
        for found, wanted in zip(rank["logprobs"], logprobs[rank["data"] :: layout.data], strict=False):
            assert (found - wanted).abs().max() <= tolerance * 10, f"{layout}: log-probs"
    last = [rank for rank in by_rank if rank["loss"]][:: layout.tensor]  # context ranks have a part of it each
    assert sum(rank["loss"][1] for rank in last) == 1.0
    assert sum(rank["loss"][0] for rank in last) == pytest.approx(loss, rel=10 * tolerance), layout
    assert sum(len(rank["logprobs"]) for rank in last) == 2 * layout.context
    for name, found in whole(by_rank, gradients).items():
        wanted = gradients[name]
        assert wanted.abs().max() > 1e-3, f"{name}: nothing to compare"
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= tolerance, f"{layout}: gradient of {name} is off by {error:.1e}"
