"""Group-relative advantages with outcome supervision: DeepSeekMath, arXiv:2402.03300, section 4.1.2."""

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
    if rewards.ndim != 1:
        raise ConfigError(
            f"rewards have shape {tuple(rewards.shape)}, but advantages are normalised one group at a time; pass [G]"
        )
    if rewards.numel() < 2:
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
    if is_degenerate(rewards):
        return torch.zeros_like(values)
    return (values - values.mean()) / (std + EPSILON)
