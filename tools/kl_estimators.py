"""k1, k2 and k3 against the exact KL, from full distributions: bias and standard deviation a token, nothing sampled.

    python tools/kl_estimators.py [--vocabulary 49152] [--contexts 64] [--seed 0]

Policies are softmaxes of random logits (normal, standard deviation 3: some 2 to 3 nats of entropy, as of a language
model); the reference's logits are off by normal noise of the given size, the old policy's by half of that. Means and
variances over a token drawn from the policy are sums over the vocabulary, averaged over the contexts. The last columns:
tokens drawn from the old policy, where k3 alone is biased and rho * k3 (`grpo.kl_unbiased`) is not.
"""

from __future__ import annotations

import argparse

import torch

from grpo_mega.objective import kl

NOISES = (0.03, 0.1, 0.3, 1.0, 2.0)


def moments(weights: torch.Tensor, values: torch.Tensor) -> tuple[float, float]:
    """Mean over contexts of the value's mean, and the root of that of its variance; both [contexts, vocabulary]."""
    mean = (weights * values).sum(dim=1)
    variance = (weights * values.square()).sum(dim=1) - mean.square()
    return mean.mean().item(), variance.mean().clamp(min=0).sqrt().item()


def row(logits: torch.Tensor, noise: float, generator: torch.Generator) -> dict[str, float]:
    """Exact KL, and (bias, standard deviation) of each estimator."""

    def near(size: float) -> torch.Tensor:
        shift = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        return torch.log_softmax(logits + size * shift, dim=1)

    logp, ref, old = torch.log_softmax(logits, dim=1), near(noise), near(noise / 2)
    exact = (logp.exp() * (logp - ref)).sum(dim=1).mean().item()
    found = {"KL": exact}
    for name in kl.ESTIMATORS:
        mean, found[f"{name} std"] = moments(logp.exp(), kl.estimate(name, logp, ref))
        found[f"{name} bias"] = mean - exact
    for name, values in (("k3 off", kl.k3(logp, ref)), ("rho k3 off", torch.exp(logp - old) * kl.k3(logp, ref))):
        mean, found[f"{name} std"] = moments(old.exp(), values)
        found[f"{name} bias"] = mean - exact
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    logits = 3 * torch.randn(options.contexts, options.vocabulary, generator=generator, dtype=torch.float64)
    names = (*kl.ESTIMATORS, "k3 off", "rho k3 off")
    titles = ("k1", "k2", "k3", "k3, tokens of pi_old", "rho k3, tokens of pi_old")
    print("bias (relative to the KL) and standard deviation of one token's estimate, in nats:\n")
    print("| noise | exact KL | " + " | ".join(titles) + " |")
    print("|---" * (len(names) + 2) + "|")
    for noise in NOISES:
        found = row(logits, noise, generator)
        cells = [f"{found[f'{name} bias'] / found['KL']:+.1e}, {found[f'{name} std']:.2g}" for name in names]
        print(f"| {noise} | {found['KL']:.3g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
