"""From rewards to advantages, outcome supervision: a number a completion, the same for each of its tokens.

    name                           A_i                                                  source
    grpo                           (r_i - mean r) / std r                               DeepSeekMath, 2402.03300, 4.1.2
    dr_grpo                        r_i - mean r                                         Dr. GRPO, 2503.20783
    rloo                           r_i - mean of the other r                            RLOO, 2402.14740, eq. 8
    best_of_n                      1 for the best, 0 for the others                     rejection-sampling fine-tuning
    reinforce_plus_plus            r_i, normalised over the batch's tokens              REINFORCE++, 2501.03262
    reinforce_plus_plus_baseline   r_i - mean r, the same                               its variant with baseline

r and the means are the group's, `batch_normalised` is over all groups of a step. `process` has process supervision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.errors import ConfigError, RewardError

# Rewards that differ only by rounding (0.1 + 0.2 against 0.3: 1e-16) must not become advantages of order 1: with
# 1e-6 they stay below 1e-9. The price for honest 0/1 rewards is below 1e-5 of the advantage even for 1 right in 100.
EPSILON = 1e-6


def is_degenerate(rewards: Tensor) -> bool:
    """True when all of `rewards` `[G]`, G >= 1, are equal: the group says nothing about what was better."""
    return bool((rewards == rewards[0]).all())


def group_advantages(rewards: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + EPSILON), the same for every token of completion i.

    rewards `[G]`, any real dtype -> advantages `[G]` float64 (dimensionless), on the same device.

    Diff from the paper: it leaves the estimator of std open. Ours is the population's (divide by G): the group is
    the whole population being normalised, so the mean square advantage is 1 (up to EPSILON) whatever G is. TRL and verl
    use the sample's (divide by G - 1), which shrinks every advantage by sqrt((G - 1) / G): 0.71 at G = 2, 0.94 at
    G = 8. EPSILON is ours too. A group whose rewards are all equal gets exactly 0, not rounding noise.

    Raises ConfigError for a group of one or a wrong shape, RewardError for a reward that is NaN or infinite.
    """
    values, std = checked(rewards)
    if is_degenerate(rewards):
        return torch.zeros_like(values)
    return (values - values.mean()) / (std + EPSILON)


def centred_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r): Dr. GRPO, arXiv:2503.20783. `[G]` -> `[G]` float64, in the reward's unit.

    Without the division a question that is nearly always or nearly never answered weighs no more than its few
    surprises do. Errors as in `group_advantages`; a group of equal rewards gets exactly 0.
    """
    values, _ = checked(rewards)
    return torch.zeros_like(values) if is_degenerate(rewards) else values - values.mean()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - (sum of the other r) / (G - 1) = (r_i - mean(r)) G / (G - 1): RLOO, arXiv:2402.14740, eq. 8.

    `[G]` -> `[G]` float64, in the reward's unit. The baseline does not depend on completion i, so that the gradient is
    unbiased. Errors as in `group_advantages`.
    """
    count = rewards.numel()
    return centred_advantages(rewards) * count / (count - 1)


def best_of_n(rewards: Tensor, best: int = 1, above: float | None = None) -> Tensor:
    """1 for the `best` completions of the highest reward (of equal ones the first) that exceed `above`, else 0. `[G]`.

    With the surrogate A ln pi and weights of its normalization this is maximum likelihood on what was chosen:
    rejection-sampling fine-tuning. A group of one is legal. Raises RewardError for a reward that is NaN or infinite.
    """
    values, _ = checked(rewards, least=1)
    order = torch.argsort(values, descending=True, stable=True)[:best]
    chosen = torch.zeros_like(values)
    chosen[order] = 1.0
    return chosen if above is None else chosen * (values > above)


def batch_normalised(values: Tensor, weights: Tensor) -> Tensor:
    """(v - mean) / (std + EPSILON) over the whole batch, each v counted `weights` times: REINFORCE++, 2501.03262.

    values `[N]` of all completions (or tokens) of a step, weights `[N]` how many tokens each stands for -> `[N]`
    float64. std is the population's. All-equal values give exactly 0. Raises RewardError where they are not finite.
    """
    values, weights = values.double(), weights.double()
    total = weights.sum()
    if not bool(torch.isfinite(values).all()):
        raise RewardError("a batch's returns are not finite; a reward function must return finite numbers")
    if total == 0 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    mean = (weights * values).sum() / total
    std = ((weights * (values - mean).square()).sum() / total).sqrt()
    return (values - mean) / (std + EPSILON)


def checked(rewards: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """The rewards as float64 and their (population's) std; raises what `group_advantages` documents."""
    if rewards.ndim != 1:
        raise ConfigError(
            f"rewards have shape {tuple(rewards.shape)}, but advantages are normalised one group at a time; pass [G]"
        )
    if rewards.numel() < least:
        raise ConfigError(
            f"a group of {rewards.numel()} has nothing to compare a completion with: its standard deviation is "
            "undefined; use grpo.group_size of 2 or more"
        )
    values = rewards.double()
    std = values.std(correction=0)
    if not torch.isfinite(std):  # NaN and inf in any reward reach it, and so does overflow of a square
        raise RewardError(
            f"rewards {rewards.tolist()} have no finite standard deviation; "
            "a reward function must return finite numbers (of magnitude below 1e150)"
        )
    return values, std
