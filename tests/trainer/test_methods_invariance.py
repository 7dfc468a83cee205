"""The methods beside GRPO, one loss and one gradient each whatever the layout and the packing: their papers'.

The oracle is each method's formula written down completion by completion on transformers and autograd, in float64, from
log-probs of whole completions; layouts cut those completions over context ranks, tensor ranks, stages and microbatches.
"""

from __future__ import annotations

import pytest
import torch
from benches import Bench, completion_logprobs, dense, ranks_of, recipe_of, three_models

from grpo_mega.data.advantages import with_advantages
from grpo_mega.trainer.objective import objective_of
from grpo_mega.trainer.penalty import penalised
from grpo_mega.types import Completion, Group, Prompt, Rollout

LAYOUTS = {
    "one process": ({}, [[0, 1, 2, 3]]),
    "data 2 by work": ({}, [None, None]),
    "pipeline 2": ({"pipeline": 2}, [[0, 1, 2, 3]]),
    "tensor 2 sequence": ({"tensor": 2, "sequence": True}, [[0, 1, 2, 3]]),
    "context 2": ({"context": 2}, [[0, 1, 2, 3]]),
    "context 2 data 2": ({"context": 2}, [[0, 3], [1, 2]]),
}
CUT = (1, 16)  # one minibatch, in microbatches of 16 rows: few completions share one


def group(index, prompt, *rollouts):
    """rollouts: (completion, step rewards at the given tokens); the reward is their sum."""
    made = []
    for n, (text, steps) in enumerate(rollouts):
        ids = tuple(text.encode())
        sampler = tuple(-4.0 - 0.3 * ((index + n + t) % 5) for t in range(len(ids)))
        reward = sum(value for _, value in steps)
        made.append(Rollout(Completion(ids, sampler, "stop", text), reward, steps=steps))
    return Group(Prompt(index, prompt, tuple(prompt.encode())), tuple(made))


def outcome(groups):
    """The same groups with rewards of whole completions."""
    return [Group(g.prompt, tuple(Rollout(r.completion, r.reward) for r in g.rollouts)) for g in groups]


STEPS = [
    group(0, "two by three", ("six", ((0, 1.0), (2, 0.5))), ("23", ((1, 0.0),)), ("sixsix", ((2, 1.0), (5, 0.0)))),
    group(1, "even", ("yes", ((2, 1.0),)), ("y", ((0, 1.0),)), ("so so", ((2, 1.0), (4, 1.0)))),
    group(2, "?", ("a", ((0, 0.0),)), ("longer", ((1, 2.0), (3, -1.0), (5, 3.0))), ("bcd", ((2, -1.0),))),
    group(3, "seven", ("8", ((0, 0.0),)), ("nine", ((3, 0.25),)), ("7.0000", ((1, 1.0), (5, 0.0)))),
]


def clip(ratio, advantage, low, high):
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


class Of:
    """One completion: what the formulas are made of. Every attribute is [|o|], or a number."""

    def __init__(self, logprobs, old, ref, rollout, advantage, entropies):
        self.logp, self.old, self.ref, self.A, self.entropies = logprobs, old, ref, advantage, entropies
        self.q = torch.tensor(rollout.completion.sampler_logprobs, dtype=torch.float64)
        self.rho = torch.exp(logprobs - old)
        self.s = torch.exp((logprobs - old).mean())  # GSPO's
        self.w = torch.exp(old - self.q)  # trainer over sampler
        self.k3 = torch.exp(ref - logprobs) - (ref - logprobs) - 1


def sequence_mask(c):
    weight = torch.exp((c.old - c.q).mean())
    return clip(c.rho, c.A, 0.2, 0.2) * (weight if 0.1 <= weight <= 0.6 else 0.0)


def off_policy(c):
    return clip(c.rho, c.A, 0.2, 0.2) * torch.where((c.A < 0) & ((c.q - c.logp).mean() > 0.6), 0.0, 1.0).detach()


# name -> (keys of grpo, the surrogate minus penalties of a completion, whether under process supervision)
METHODS = {
    "gspo": ({"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04}, lambda c: clip(c.s, c.A, 0.03, 0.04), False),
    "gspo_token, process": (
        {"ratio": "sequence_token", "clip_low": 0.2, "clip_high": 0.2},
        lambda c: clip(c.s.detach() * torch.exp(c.logp - c.logp.detach()), c.A, 0.2, 0.2),
        True,
    ),
    "process supervision": ({"kl_coef": 0.1}, lambda c: clip(c.rho, c.A, 0.2, 0.2) - 0.1 * c.k3, True),
    "process supervision, dr_grpo": (
        {"advantage": "dr_grpo", "normalization": "constant"}, lambda c: clip(c.rho, c.A, 0.2, 0.2), True,
    ),
    "dapo": ({"clip_high": 0.28, "normalization": "group_token"}, lambda c: clip(c.rho, c.A, 0.2, 0.28), False),
    "cispo": (
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.2, "normalization": "group_token"},
        lambda c: c.rho.clamp(max=1.2).detach() * c.A * c.logp, False,
    ),
    "rloo, kl in reward": (
        {"advantage": "rloo", "surrogate": "logprob", "kl_coef": 0.3, "kl_estimator": "k1", "kl_in": "reward"},
        lambda c: c.A * c.logp, False,
    ),
    "reinforce++": (
        {
            "advantage": "reinforce_plus_plus", "kl_coef": 0.3, "kl_estimator": "k1", "kl_in": "reward",
            "normalization": "token",
        },
        lambda c: clip(c.rho, c.A, 0.2, 0.2), False,
    ),
    "mis, geometric": (
        {"correction": "mask", "correction_level": "geometric", "correction_low": 0.1, "correction_high": 0.6},
        sequence_mask, False,
    ),
    "deepseek v3.2": (
        {"off_policy_threshold": 0.6, "kl_coef": 0.2, "kl_unbiased": True},
        lambda c: off_policy(c) - 0.2 * c.rho * c.k3, False,
    ),
    "entropy bonus": ({"entropy_coef": 0.05}, lambda c: clip(c.rho, c.A, 0.2, 0.2) + 0.05 * c.entropies, False),
}  # fmt: skip


# ---- the oracle


def advantages_of(grpo, groups, old, ref):
    """[[ [|o|] of each completion ] of each group], each by its paper."""
    result, k = [], {key: old[key] - ref[key] for key in old}
    if grpo.get("advantage") == "reinforce_plus_plus":
        returns = [
            r.reward - 0.3 * k[g.prompt.index, i].flip(0).cumsum(0).flip(0)
            for g in groups for i, r in enumerate(g.rollouts)
        ]  # fmt: skip
        every = torch.cat(returns)
        normalised = iter([(one - every.mean()) / (every.std(correction=0) + 1e-6) for one in returns])
        return [[next(normalised) for _ in g.rollouts] for g in groups]
    for g in groups:
        lengths = [len(r.completion.token_ids) for r in g.rollouts]
        if g.rollouts[0].steps:
            every = torch.tensor([value for r in g.rollouts for _, value in r.steps], dtype=torch.float64)
            scale = 1.0 if grpo.get("advantage") == "dr_grpo" else every.std(correction=0) + 1e-6
            normalised = [[(end, (v - every.mean()) / scale) for end, v in r.steps] for r in g.rollouts]
            zero = torch.zeros((), dtype=torch.float64)
            result.append(
                [
                    torch.stack([sum((v for end, v in later if end >= t), zero) for t in range(n)])
                    for later, n in zip(normalised, lengths, strict=True)
                ]
            )
            continue
        rewards = torch.tensor([r.reward for r in g.rollouts], dtype=torch.float64)
        if grpo.get("advantage") == "rloo":
            rewards = rewards - 0.3 * torch.stack([k[g.prompt.index, i].sum() for i in range(len(rewards))])
            values = [rewards[i] - (rewards.sum() - rewards[i]) / (len(rewards) - 1) for i in range(len(rewards))]
        else:
            values = list((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6))
        result.append([value.expand(n) for value, n in zip(values, lengths, strict=True)])
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three_models(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def expected(folders):
    """{method: (loss, gradients by name)}"""
    models = [dense(folder, trainable=folder is folders[0]) for folder in folders]
    keys = [(g.prompt.index, i) for g in STEPS for i in range(len(g.rollouts))]
    by_model = [
        {(q, i): completion_logprobs(m, STEPS[q].prompt, STEPS[q].rollouts[i].completion) for q, i in keys}
        for m in models
    ]
    entropies = {
        (q, i): completion_entropies(models[0], STEPS[q].prompt, STEPS[q].rollouts[i].completion) for q, i in keys
    }
    names, parameters = zip(*models[0].named_parameters(), strict=True)
    answers = {}
    for name, (grpo, formula, process) in METHODS.items():
        groups = STEPS if process else outcome(STEPS)
        advantages = advantages_of(grpo, groups, *by_model[1:])
        losses = [
            [
                -formula(Of(*(of[q, i] for of in by_model), groups[q].rollouts[i], advantages[q][i], entropies[q, i]))
                for i in range(3)
            ]
            for q in range(4)
        ]
        if grpo.get("ratio") == "sequence":  # GSPO, eq. 5: one term a completion
            losses = [[loss.expand(1) if loss.ndim == 0 else loss for loss in of_prompt] for of_prompt in losses]
        loss = reduced(losses, grpo.get("normalization", "sequence"))
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        answers[name] = loss.item(), dict(zip(names, gradients, strict=True))
    return answers


def completion_entropies(model, prompt, completion):
    from benches import TEMPERATURE

    tokens = torch.tensor([prompt.token_ids + completion.token_ids])
    logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=1)


def reduced(losses, normalization):
    from benches import LIMIT

    everything = [loss for of_prompt in losses for loss in of_prompt]
    if normalization == "token":
        return torch.cat(everything).mean()
    if normalization == "constant":
        return torch.stack([loss.sum() / LIMIT for loss in everything]).mean()
    if normalization == "group_token":
        return torch.stack([torch.cat(of_prompt).mean() for of_prompt in losses]).mean()
    return torch.stack([torch.stack([loss.mean() for loss in of_prompt]).mean() for of_prompt in losses]).mean()


# ---- what the ranks do


def all_methods(folders, layout, scratch):
    """{method: (metrics, gradients)}, from the writer."""
    bench, results = Bench(folders, layout, torch.float64), {}
    for name, (grpo, _, process) in METHODS.items():
        recipe = recipe_of(folders[0], bench.layout, cut=CUT, **grpo)
        groups = with_advantages(STEPS if process else outcome(STEPS), recipe.grpo)
        parts = list(bench.batches(groups, recipe))
        if recipe.grpo.kl_in == "reward":
            parts = penalised(groups, parts, recipe, bench.mesh)
        (batches,) = parts
        metrics = bench.total(bench.policy.gradients(batches, objective_of(recipe)))
        results[name] = metrics, bench.gradients(scratch)
    return results if bench.mesh.is_writer else None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_the_papers(ranks, folders, expected, tmp_path, layout):
    found = ranks(ranks_of(LAYOUTS[layout]), all_methods, folders, LAYOUTS[layout], tmp_path, timeout=150)[0]
    assert found.keys() == expected.keys()
    for name, (metrics, gradients) in found.items():
        loss, wanted = expected[name]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-9), name
        for tensor, gradient in gradients.items():
            # megatron divides once, by a float32
            off = ((gradient - wanted[tensor]).norm() / wanted[tensor].norm()).item()
            assert off < 1e-7, f"{name} {tensor}: off by {off:.1e}"
    for name, metric in (("gspo", "clip_fraction"), ("deepseek v3.2", "on_policy"), ("mis, geometric", "ratio")):
        assert 0 < found[name][0][metric] < 2, f"{name}: the case is to have both kinds of completions"
    assert 0 < found["deepseek v3.2"][0]["on_policy"] < 1
