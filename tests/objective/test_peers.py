"""The numbers of other trainers on one batch: TRL 1.16.0 (`GRPOTrainer._compute_loss`) and verl 0.9.1 (`core_algos`).

Their code was run once, in float64, on the batch below (four completions of 5, 3, 4 and 2 tokens, padded to 5); its
loss and a checksum of its gradient, the sum over positions p = 1..20 of the padded batch of p dL/dlogp, are constants.
Where they divide by G - 1 what we divide by G, or add an epsilon, the test says so.
"""

from __future__ import annotations

import pytest
import torch

from grpo_mega.config import GrpoConfig
from grpo_mega.data.advantages import with_advantages
from grpo_mega.objective.grpo import Terms, grpo_loss
from grpo_mega.types import Completion, Group, Prompt, Rollout, Segments, TokenBatch

LENGTHS, WIDTH = (5, 3, 4, 2), 5
OLD = [-0.4784, -2.0736, -1.6607, -0.7314, -1.187, -1.528, -1.3831, -1.3384, -0.4951, -0.3471, -0.3227, -1.5252, -2.0188, -1.4529]  # fmt: skip  # noqa: E501
NEW = [-0.1869, -2.3359, -1.497, -0.74, -0.993, -1.5825, -1.6223, -0.7885, -0.4005, -0.2322, -0.5941, -1.6371, -2.6874, -1.0474]  # fmt: skip  # noqa: E501
REF = [-0.4791, -2.3928, -1.9059, -1.105, -1.2887, -1.6233, -1.506, -1.101, -0.5054, -0.6771, -0.458, -1.5076, -2.4303, -1.4437]  # fmt: skip  # noqa: E501
SAMPLER = [-0.251, -1.9305, -1.5153, -0.6845, -1.1199, -1.4391, -1.2276, -1.2726, -0.5813, -0.2443, -0.0705, -1.4272, -2.0174, -1.5115]  # fmt: skip  # noqa: E501
ADVANTAGES = (1.2, -0.8, 0.5, -0.9)

SEQUENCE = [1 / (len(LENGTHS) * n) for n in LENGTHS]
TOKEN = [1 / sum(LENGTHS)] * len(LENGTHS)
CONSTANT = [1 / (len(LENGTHS) * 8)] * len(LENGTHS)  # max_completion_length=8

# (terms, weights, loss, checksum of the gradient)
TRL = {
    "grpo, beta 0.04": ({"kl_coef": 0.04}, SEQUENCE, 0.050672424934521815, 2.1513985807498877),
    "dapo": ({"clip_high": 0.28}, TOKEN, -0.25741744304002456, -0.2523119774306689),
    "dr_grpo": ({}, CONSTANT, -0.10909152071915201, 0.11725656292837608),
    "two-sided clip, delta 1.5": ({"dual_clip": 1.5}, SEQUENCE, 0.03372967433884799, -1.6628795934051912),
    "gspo": (
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.06}, SEQUENCE, -0.006104525237623781,
        0.028750529832239913,
    ),
    "cispo, epsilon_high 1.1": (
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1}, TOKEN, 0.19183226015777372, -0.1529904109894613,
    ),
    "sapo": ({"surrogate": "sapo"}, SEQUENCE, -0.03568739493751116, 2.616540984441429),
    "use_bias_correction_kl, beta 0.3": (
        {"kl_coef": 0.3, "kl_unbiased": True}, SEQUENCE, 0.0618192478024428, 2.68617830100743,
    ),
    "off_policy_mask_threshold 0.05": (
        {"off_policy_threshold": 0.05}, SEQUENCE, -0.20948167891237973, -0.7385704194150127,
    ),
    "token_truncate at 1.05": (
        {"correction": "truncate", "correction_high": 1.05}, SEQUENCE, 0.08456389003667969, 2.362294004778664,
    ),
    "sequence_mask at 1.1": (
        {"correction": "mask", "correction_level": "sequence", "correction_high": 1.1}, SEQUENCE, 0.18953749534060738,
        2.665451868078358,
    ),
}  # fmt: skip
VERL = {  # agg_loss adds 1e-8 to its denominators
    "gspo": (
        {"ratio": "sequence_token", "clip_low": 0.05, "clip_high": 0.06}, SEQUENCE, -0.0061045260972628634,
        0.028750528489685345,
    ),
    "sapo": ({"surrogate": "sapo"}, SEQUENCE, -0.03568743353997683, 2.6165409351351627),
    "cispo": (
        {"surrogate": "cispo", "clip_low": 0.3, "clip_high": 0.1}, TOKEN, 0.15942661665118457, 0.03994338974932954,
    ),
}  # fmt: skip


def each_token(values):
    return torch.tensor([v for v, n in zip(values, LENGTHS, strict=True) for _ in range(n)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "relative"), [*((case, 1e-11) for case in TRL.items()), *((case, 2e-6) for case in VERL.items())]
)
def test_loss_and_gradient(case, relative):
    name, (terms, weights, loss, checksum) = case
    old, ref, sampler = (torch.tensor(values, dtype=torch.float64) for values in (OLD, REF, SAMPLER))
    new = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    segments = Segments(each_token(range(4)).long(), 4)
    tokens = TokenBatch(each_token(weights), each_token(ADVANTAGES), sampler, old, ref, segments)
    found, _ = grpo_loss(new, torch.zeros_like(new), tokens, Terms(**({"kl_coef": 0.0} | terms)))
    (gradient,) = torch.autograd.grad(found, new)
    places = torch.tensor([WIDTH * i + t + 1.0 for i, n in enumerate(LENGTHS) for t in range(n)], dtype=torch.float64)
    assert found.item() == pytest.approx(loss, rel=relative), name
    assert (gradient * places).sum().item() == pytest.approx(checksum, rel=relative), name


# verl's advantages of rewards 1, 0.25 | 0, 0.5, a KL penalty of 0.1 k1 in the reward for the first and the last
REWARDS = (1.0, 0.25, 0.0, 0.5)
REINFORCE_PP = [1.086518277436, 1.086689081306, 1.1645756462, 1.22440580194, 1.315566267618, -0.484974932295, -0.46172120537, -0.431732925841, -1.211428193584, -1.208914936634, -1.128393112025, -1.095379163936, 0.022190559977, 0.122598835209]  # fmt: skip  # noqa: E501
REINFORCE_PP_BASELINE = [1.052968141914] * 5 + [-1.158264956106] * 3 + [-0.789726106436] * 4 + [0.684429292244] * 2
RLOO = [0.64404] * 5 + [-0.64404] * 3 + [-0.50557] * 4 + [0.50557] * 2


@pytest.mark.parametrize(
    ("name", "penalised", "expected"),
    [
        ("reinforce_plus_plus", True, REINFORCE_PP),
        ("reinforce_plus_plus_baseline", False, REINFORCE_PP_BASELINE),
        ("rloo", True, RLOO),
    ],
)
def test_verls_advantages(name, penalised, expected):
    k1 = (torch.tensor(OLD, dtype=torch.float64) - torch.tensor(REF, dtype=torch.float64)).split(LENGTHS)
    rollouts = [
        Rollout(Completion((1,) * n, (0.0,) * n, "stop"), reward) for n, reward in zip(LENGTHS, REWARDS, strict=True)
    ]
    groups = [Group(Prompt(q, "", (1,)), tuple(rollouts[2 * q : 2 * q + 2])) for q in range(2)]
    kl_in = {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"} if penalised else {"kl_coef": 0.0}
    grpo = GrpoConfig(advantage=name, group_size=2, **kl_in)
    found = with_advantages(groups, grpo, {i: part.numpy() for i, part in enumerate(k1)} if penalised else None)
    advantages = [
        value
        for group in found
        for one in group.rollouts
        for value in (
            one.advantage if isinstance(one.advantage, tuple) else (one.advantage,) * len(one.completion.token_ids)
        )
    ]
    count = sum(LENGTHS)
    # verl divides by the sample's std, over N - 1 tokens; ours is the population's plus 1e-6
    scale = 1.0 if name == "rloo" else (count / (count - 1)) ** 0.5
    assert advantages == pytest.approx([scale * value for value in expected], rel=1e-5)
