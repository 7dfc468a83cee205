"""One loss and one gradient whatever the layout, the packing and the number of microbatches: the paper's.

The oracle is DeepSeekMath's eq. 3 (arXiv:2402.03300) written down sequence by sequence on transformers and autograd, in
float64; what every layout is held to is that gradient, tensor by tensor under its Hugging Face name.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import ranks as pool
import torch
from benches import LIMIT, Bench, completion_logprobs, dense, ranks_of, recipe_of, three_models

from grpo_mega.config import GrpoConfig
from grpo_mega.data.advantages import with_advantages
from grpo_mega.trainer.objective import objective_of
from grpo_mega.types import Completion, Group, Prompt, Rollout

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
CASES = list(  # normalization, kl_coef, (minibatches, tokens_per_microbatch)
    itertools.product(("sequence", "group_token", "token", "constant"), (0.0, 0.1), ((1, 1000), (2, 16)))
)
ALL = [[0, 1, 2, 3]]
LAYOUTS = {  # keys of `parallel`, positions of each data-parallel rank (None: training_share's)
    "one process": ({}, ALL),
    "data 2": ({}, [[0, 1, 2], [3]]),  # of the first two groups, a minibatch, the second rank has none
    "data 2 by work": ({}, [None, None]),  # the loop's own shares, in microbatches of fixed rows
    "pipeline 2": ({"pipeline": 2}, ALL),
    "interleaved": ({"pipeline": 2, "virtual_pipeline": 2}, ALL),
    "tensor 2": ({"tensor": 2}, ALL),
    "tensor 2 sequence": ({"tensor": 2, "sequence": True}, ALL),
    "context 2": ({"context": 2}, ALL),
}


def group(index, prompt, *rollouts):
    """rollouts: (reward, completion) or (reward, completion, counts)."""
    made = []
    for reward, text, *counts in rollouts:
        ids = tuple(text.encode())
        completion = Completion(ids, (-1.0,) * len(ids), "length" if counts else "stop", text)
        made.append(Rollout(completion, reward, counts=not counts or counts[0]))
    group = Group(Prompt(index, prompt, tuple(prompt.encode())), tuple(made))
    return with_advantages([group], GrpoConfig())[0]


GROUPS = [
    group(0, "two by three", (1.0, "six"), (0.0, "23"), (0.5, "sixsix")),
    group(1, "even", (1.0, "yes"), (1.0, "y"), (1.0, "so so")),  # degenerate: advantage 0, but a place in D
    group(2, "?", (0.0, "a"), (3.0, "longer", False), (-1.0, "bcd")),  # one prompt token; a masked completion
    group(3, "seven", (0.0, "8"), (0.0, "nine"), (1.0, "7.0000")),
]


# ---- the oracle


class Oracle:
    """The three models' log-probs of every counted completion, and the formula on them."""

    def __init__(self, models):
        self.policy = models[0]
        self.logprobs = {  # (prompt, completion) -> [policy, old, reference], only the first with a gradient
            (q.prompt.index, i): [completion_logprobs(m, q.prompt, rollout.completion) for m in models]
            for q in GROUPS
            for i, rollout in enumerate(q.rollouts)
            if rollout.counts
        }

    def __call__(self, part, normalization, kl_coef):
        """(loss, gradients by name, mean k3 over counted tokens) of one minibatch."""
        prompts, divergences = [], []
        for q in part:
            rewards = torch.tensor([r.reward for r in q.rollouts], dtype=torch.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            completions = []
            for i, advantage in enumerate(advantages):
                if (q.prompt.index, i) in self.logprobs:
                    logprobs, old, ref = self.logprobs[q.prompt.index, i]
                    ratio = torch.exp(logprobs - old)
                    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                    k3 = torch.exp(ref - logprobs) - (ref - logprobs) - 1
                    completions.append(kl_coef * k3 - surrogate)
                    divergences.append(k3.detach())
            prompts.append(completions)
        everything = [losses for completions in prompts for losses in completions]
        loss = {
            "sequence": lambda: mean([mean([mean(losses) for losses in completions]) for completions in prompts]),
            "group_token": lambda: mean([mean(torch.cat(completions)) for completions in prompts]),
            "token": lambda: mean(torch.cat(everything)),
            "constant": lambda: mean([losses.sum() / LIMIT for losses in everything]),
        }[normalization]()
        names, parameters = zip(*self.policy.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        return loss.item(), dict(zip(names, gradients, strict=True)), mean(torch.cat(divergences)).item()


def mean(values):
    return sum(values) / len(values)


# ---- what the ranks do


def all_cases(folders, layout, scratch):
    """[[(metrics, gradients) of each minibatch] of each case], from the writer."""
    bench = Bench(folders, layout, torch.float64)
    results = []
    for normalization, kl_coef, cut in CASES:
        recipe = recipe_of(folders[0], bench.layout, cut=cut, normalization=normalization, kl_coef=kl_coef, **CLIP)
        parts = []
        for batches in bench.batches(GROUPS, recipe):
            metrics = bench.total(bench.policy.gradients(batches, objective_of(recipe)))
            parts.append((metrics, bench.gradients(scratch)))
        results.append(parts)
    return results if bench.mesh.is_writer else None


def first_updates(folders, layout, scratch, dtype=torch.float32):
    """Metrics of two updates on one batch, old log-probs from a forward of their own; the first gradient."""
    bench = Bench(folders, layout, dtype)
    recipe = recipe_of(folders[0], bench.layout, cut=(1, 24), kl_coef=0.1, clip_low=1e-6, clip_high=1e-6)
    (batches,) = bench.batches(GROUPS, recipe, old=bench.policy)
    for batch in batches:
        assert {t.dtype for t in (batch.loss_weights, batch.advantages, batch.ref_logprobs) if t is not None} == {
            torch.float32
        }
    bench.policy.gradients(batches, objective_of(recipe))
    gradients = bench.gradients(scratch)
    bench.policy.begin_step()
    return [bench.total(bench.policy.update(batches, objective_of(recipe))) for _ in range(2)], gradients


# ---- the tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Policy, old policy and reference: the second and third are the first with a little noise."""
    return three_models(tmp_path_factory.mktemp("invariance"))


@pytest.fixture(scope="module")
def expected(folders):
    """The oracle's answer to each case."""
    oracle = Oracle([dense(folder, trainable=folder is folders[0]) for folder in folders])
    answers = []
    for normalization, kl_coef, (count, _) in CASES:
        size = len(GROUPS) // count
        parts = [GROUPS[k * size : (k + 1) * size] for k in range(count)]
        answers.append([oracle(part, normalization, kl_coef) for part in parts])
    return answers


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_are_the_papers(ranks, folders, expected, tmp_path, name):
    found = ranks(ranks_of(LAYOUTS[name]), all_cases, folders, LAYOUTS[name], tmp_path, timeout=150)[0]
    for case, parts, answers in zip(CASES, found, expected, strict=True):
        for (metrics, gradients), (loss, wanted, k3) in zip(parts, answers, strict=True):
            assert metrics["loss"] == pytest.approx(loss, rel=1e-9), case
            assert 0 < metrics["clip_fraction"] < 0.5, "the old policy was made to clip some tokens"
            if case[1]:
                assert metrics["kl"] == pytest.approx(k3, rel=1e-9), case
            assert gradients.keys() == wanted.keys()
            for tensor, gradient in gradients.items():
                # megatron divides once, by a float32
                off = ((gradient - wanted[tensor]).norm() / wanted[tensor].norm()).item()
                assert off < 1e-7, f"{case} {tensor}: off by {off:.1e}"


@pytest.fixture(scope="module")
def updates(folders, tmp_path_factory):
    """first_updates of a layout, run once."""

    @functools.cache
    def of(name):
        return pool.ranks(
            ranks_of(LAYOUTS[name]), first_updates, folders, LAYOUTS[name], tmp_path_factory.mktemp("update")
        )[0]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_update_has_ratio_one_and_the_second_has_not(updates, name):
    (first, second), _ = updates(name)
    assert first["clip_fraction"] == 0.0 and abs(first["ratio"] - 1) <= 1e-6
    assert second["clip_fraction"] > 0.1 and second["ratio"] != 1  # the clip range was made as narrow as that


@pytest.mark.parametrize("name", LAYOUTS)
def test_norm_that_clips_is_the_gradients(updates, name):
    """Tied embeddings live on two pipeline stages and norms on every tensor rank, but count once; slices count all."""
    (first, _), gradients = updates(name)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", ["one process", "pipeline 2", "tensor 2 sequence"])
def test_bf16_is_float32_to_bf16s_rounding(ranks, folders, updates, tmp_path, name):
    """Weights and activations have 8 bits, log-probs, weights of tokens and gradients' sums 24."""
    (first, second), gradients = ranks(
        ranks_of(LAYOUTS[name]), first_updates, folders, LAYOUTS[name], tmp_path, torch.bfloat16
    )[0]
    (wanted, _), exact = updates(name)
    assert first["clip_fraction"] == 0.0 and first["ratio"] == pytest.approx(1, abs=1e-6)
    assert second["ratio"] != 1
    for metric in ("logprob", "entropy", "kl"):
        assert first[metric] == pytest.approx(wanted[metric], abs=0.02) and first[metric] != wanted[metric]
    for tensor, gradient in gradients.items():
        off = ((gradient - exact[tensor]).norm() / exact[tensor].norm()).item()
        assert off < 0.05, f"{tensor}: off by {off:.1e}"
