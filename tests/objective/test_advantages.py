"""Oracle: A_i = (r_i - mean r) / (std r + 1e-6) with the population's std, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.errors import ConfigError, RewardError
from grpo_mega.objective.advantages import group_advantages, is_degenerate


def test_one_right_in_four():
    # mean 1/4; variance (9/16 + 3/16) / 4 = 3/16, std 0.4330127018922193; 0.75 / (std + 1e-6), -0.25 / (std + 1e-6).
    # The sample's std would be 0.5 and the advantages 1.5, -0.5.
    advantages = group_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    expected = torch.tensor([-0.5773489358593716, 1.7320468075781149, -0.5773489358593716, -0.5773489358593716])
    assert advantages.dtype == torch.float64
    torch.testing.assert_close(advantages, expected.double(), rtol=1e-7, atol=0)


def test_a_pair_ignores_where_the_rewards_lie():
    # r = (1001, 1003): mean 1002, population std 1, so -1 and +1 over 1 + 1e-6.
    advantages = group_advantages(torch.tensor([1001, 1003]))
    expected = torch.tensor([-0.999999000000999999, 0.999999000000999999], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_zero_mean_and_mean_square_one_whatever_the_group_size(size: int):
    advantages = group_advantages(torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64))
    assert abs(advantages.sum().item()) < 1e-12
    assert advantages.square().mean().item() == pytest.approx(1.0, rel=1e-4)  # sample's std: (G - 1) / G


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7, 1e30])
def test_equal_rewards_give_exactly_zero(reward: float):
    # The mean of seven 0.1 is not 0.1 in float64; without a special case the difference over 1e-6 would remain.
    rewards = torch.full((7,), reward, dtype=torch.float64)
    assert is_degenerate(rewards)
    assert group_advantages(rewards).tolist() == [0.0] * 7


def test_rewards_that_differ_by_rounding_stay_harmless():
    rewards = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)
    assert not is_degenerate(rewards)
    assert group_advantages(rewards).abs().max() < 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_no_finite_std(bad: float):
    with pytest.raises(RewardError, match="finite"):
        group_advantages(torch.tensor([0.0, bad, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_whole_group_of_nan_or_inf_is_not_a_degenerate_zero(bad: float):
    with pytest.raises(RewardError, match="finite"):
        group_advantages(torch.full((4,), bad))


@pytest.mark.parametrize("rewards", [torch.tensor([1.0]), torch.tensor([])])
def test_a_group_of_one_is_refused(rewards: torch.Tensor):
    with pytest.raises(ConfigError, match=f"group of {len(rewards)} .*group_size of 2"):
        group_advantages(rewards)


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_one_group_at_a_time(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"shape \("):
        group_advantages(torch.zeros(shape))
