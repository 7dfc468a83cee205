"""Mixture-of-experts feed-forward: our router and megatron's experts, so that no layout changes a number.

Each row goes through the k experts that its router chooses, and what they give is added with weights (`routing.Router`
has the rules), beside what the shared experts give, which are one feed-forward for all rows, cut by tensor ranks. Rows
travel to the ranks that hold their experts and back by megatron's all-to-all dispatcher. Nothing is dropped: a
capacity (moe_expert_capacity_factor) is never set.

The router is ours because megatron's rounds scores to float32 whatever the dtype (moe_utils.py), and scales the
auxiliary losses by what each rank sees: 0.16.1 divides them by the tensor x context ranks under
`calculate_per_token_loss`, 0.19.2 does not, and in both padding counts. Here every row's part of a loss is added once,
on the rank that has the row, as the policy's loss is (trainer/policy): megatron's one division by R makes the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from grpo_mega.config import MoeConfig, ParallelConfig
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.routing import Router as Rule
from grpo_mega.parallel import collectives

LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


@dataclass(frozen=True)
class Routing:
    """What the routers of one forward are told besides hidden states; it travels with the rows (`model/attention`).

    real: `[T]` bool, False for padding, of the rows that this rank's tensor group has; weight: what a real row counts
    in the auxiliary losses, R / V with V the real rows and R all rows of the update. chosen: by layer, each row's
    experts `[rows of this rank, k]`; `records` fills it, else it says what is chosen (None: the router decides).
    """

    real: Tensor
    weight: float = 0.0
    chosen: dict[int, Tensor] | None = None
    records: bool = False


class TopRouter(Router):
    """Logits in max(float32, dtype), k experts chosen and weighed by `rule`; and the auxiliary losses.

    With V real rows x of an update, s(x) the logits of the E experts and p(x) their softmax, or by the rule their
    sigmoids over the sum of them (arXiv:2412.19437, equation 19):

    - z loss (arXiv:2202.08906, equation 5): z_loss_coef / V * sum_x logsumexp(s(x))^2. A mean over rows: the same under
      every layout.
    - load balancing (arXiv:2101.03961, equations 4 to 6): aux_loss_coef times the mean over microbatches, weighted by
      their real rows V_m, of E * sum_e f_e P_e, with f_e the share of the V_m k choices that fell on expert e and P_e
      the mean of p_e(x). f is counted over the tensor and context ranks that share a microbatch. By construction it
      depends on which rows are a microbatch's: how many ranks share it changes nothing, another
      batch.tokens_per_microbatch or number of data ranks does.

    Both are added up over layers; padding rows count in neither. Under replay the choices counted are the replayed.
    DeepSeek-V3's own balance loss is of this kind, with p and f of one sequence in place of a microbatch.

    expert_bias `[E]` float32 has a part in the choice only, and no gradient. Pretraining moves it by a fixed step
    towards an even load after each update (balancing without a loss, arXiv:2412.19437, section 2.1.2); post-training
    does not: it stays as the folder has it, and so does the choice that the weights were trained for.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, *, rule: Rule, **more: Any):
        super().__init__(config, pg_collection, **more)
        self.rule = rule
        self.told: Routing | None = None  # of the forward that runs; see `MixtureLayer`
        bias = torch.empty(config.num_moe_experts, dtype=torch.float32) if rule.biased else None
        self.expert_bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input [T, 1, H] -> weights [T, E], 0 where not chosen, and the choice [T, E] bool."""
        return self.routing(self.gating(input).flatten(0, -2))

    def gating(self, input: Tensor) -> Tensor:
        """Logits [T, 1, E] in max(float32, dtype)."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from logits [T, E]."""
        chosen = self._choose(logits.detach())
        weights = weigh(logits, chosen, self.rule)
        choice = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        if self.training and torch.is_grad_enabled() and self.told is not None and self.told.weight:
            weights = MoEAuxLossAutoScaler.apply(weights, self._losses(logits, choice, self.told))
        return torch.zeros_like(logits).scatter(1, chosen, weights), choice

    def _choose(self, logits: Tensor) -> Tensor:
        """[T, k]: the experts of each row, the likeliest first; those of an earlier pass where they are replayed."""
        told = self.told
        if told is not None and told.chosen is not None and not told.records:
            return told.chosen[self.layer_number]
        chosen = choose(logits, self.config.moe_router_topk, self.rule, self.expert_bias)
        if told is not None and told.chosen is not None:
            told.chosen[self.layer_number] = chosen
        return chosen

    def _losses(self, logits: Tensor, choice: Tensor, routing: Routing) -> Tensor:
        """This rank's rows' part of both losses, times R: megatron divides by it."""
        real = routing.real
        if self.config.sequence_parallel:
            real = real.chunk(collectives.size(self.tp_group))[collectives.rank(self.tp_group)]
        total = logits.new_zeros(())
        if self.config.moe_z_loss_coeff:
            squares = torch.logsumexp(logits, dim=1).square()
            total = total + self.config.moe_z_loss_coeff * (squares * real).sum()
        if self.config.moe_aux_loss_coeff:
            # without sequence parallelism, which training has, tensor ranks would count the same rows
            counts = collectives.sum_((choice & real[:, None]).sum(dim=0), self.tp_cp_group).to(logits.dtype)
            shares = counts / counts.sum().clamp(min=1)
            mass = (_shares(logits, self.rule) * real[:, None]).sum(dim=0)
            total = total + self.config.moe_aux_loss_coeff * len(counts) * (shares * mass).sum()
        return routing.weight * total


def choose(logits: Tensor, count: int, rule: Rule, bias: Tensor | None) -> Tensor:
    """[T, count]: the experts that the rule chooses for each row from logits [T, E]; bias `[E]` where it has one."""
    ranked = logits  # scores are in the order of their logits
    if bias is not None or rule.group_score == "two":
        ranked = _scores(logits, rule)
    if bias is not None:
        ranked = ranked + bias
    if rule.groups > 1:
        groups = ranked.unflatten(1, (rule.groups, -1))
        best = groups.amax(dim=2) if rule.group_score == "max" else groups.topk(2, dim=2).values.sum(dim=2)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(rule.top_groups, dim=1).indices, True)
        ranked = groups.masked_fill(~kept.unsqueeze(2), -torch.inf).flatten(1)
    return ranked.topk(count, dim=1).indices


def weigh(logits: Tensor, chosen: Tensor, rule: Rule) -> Tensor:
    """[T, k]: the weights of the chosen experts [T, k]; a router's gradient comes through them, not the choice."""
    if rule.score == "softmax" and rule.normalised:
        weights = torch.softmax(logits.gather(1, chosen), dim=1)  # over all, made to add up to 1: over the chosen
    else:
        weights = _scores(logits, rule).gather(1, chosen)
        if rule.normalised:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-20)  # sigmoids may all be 0
    return weights if rule.scale == 1.0 else weights * rule.scale


def _scores(logits: Tensor, rule: Rule) -> Tensor:
    return torch.softmax(logits, dim=1) if rule.score == "softmax" else torch.sigmoid(logits)


def _shares(logits: Tensor, rule: Rule) -> Tensor:
    """Scores that add up to 1 in each row."""
    scores = _scores(logits, rule)
    return scores if rule.score == "softmax" else scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-20)


class Experts(SequentialMLP):
    """megatron's experts of this rank, one after the other; a class, since 0.16.1 builds from specs, 0.19.2 calls."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **more: Any):
        more.pop("submodules", None)
        super().__init__(num_local_experts, config, LINEARS, pg_collection=pg_collection, **more)


class SharedExperts(SharedExpertMLP):
    """What all rows pass through besides their experts: one feed-forward that tensor ranks divide; see `Experts`."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, gate: bool = False, **more: Any):
        more.pop("submodules", None)
        super().__init__(config, LINEARS, gate, pg_collection=pg_collection, **more)


class MixtureLayer(TransformerLayer):
    """A decoder layer that hands its rows' `Routing` to its router, in a recomputed forward too.

    Neither that nor the weights that megatron's dispatcher keeps (token_dispatcher.py) outlive the forward: their graph
    would lead through the gradient buffers' hooks back to this layer, a circle that Python's collector cannot see.
    """

    def forward(self, *args: Any, **kwargs: Any):
        self.mlp.router.told = getattr(kwargs["packed_seq_params"], "routing", None)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.mlp.router.told = self.mlp.token_dispatcher.probs = None


def mixture_spec(arch: Architecture) -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=Experts,
            shared_experts=SharedExperts if arch.shared_ffn_size else None,
            router=partial(TopRouter, rule=arch.router),
        ),
    )


def mixture_settings(arch: Architecture, parallel: ParallelConfig, moe: MoeConfig) -> dict[str, Any]:
    """The mixture's part of megatron's configuration; nothing for a dense model."""
    if not arch.num_experts:
        return {}
    which = [int(arch.is_mixture(number)) for number in range(arch.num_layers)]
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.expert_ffn_size,
        "moe_shared_expert_intermediate_size": arch.shared_ffn_size or None,
        # a list: checkpoints then name tensors by layer, as they must where layers differ (transformer_block.py)
        "moe_layer_freq": 1 if all(which) else which,
        "moe_router_pre_softmax": arch.experts_per_token == 1,  # megatron asks for it; our router reads neither
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": moe.aux_loss_coef,
        "moe_z_loss_coeff": moe.z_loss_coef,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
    }
