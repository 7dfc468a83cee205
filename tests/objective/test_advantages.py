"""Oracle: A_i = (r_i - mean r) / (std r + 1e-6) with the population's std, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.errors import ConfigError, RewardError
from grpo_mega.objective.advantages import (
    batch_normalised,
    best_of_n,
    centred_advantages,
    group_advantages,
    is_degenerate,
    leave_one_out_advantages,
)


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


def test_dr_grpo_and_rloo_by_hand():
    # mean of (1, 0, 0, 3) is 1; the others' means are 1, 4/3, 4/3, 1/3
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0])
    assert centred_advantages(rewards).tolist() == [0, -1, -1, 2]
    assert leave_one_out_advantages(rewards).tolist() == pytest.approx([0, -4 / 3, -4 / 3, 8 / 3])


@pytest.mark.parametrize("estimator", [centred_advantages, leave_one_out_advantages])
def test_other_estimators_are_as_strict(estimator):
    assert torch.count_nonzero(estimator(torch.full((7,), 0.1 + 0.2))) == 0
    with pytest.raises(ConfigError, match="a group of 1 has nothing to compare"):
        estimator(torch.ones(1))
    with pytest.raises(RewardError, match="no finite standard deviation"):
        estimator(torch.tensor([1.0, math.nan]))


def test_best_of_n_by_hand():
    rewards = torch.tensor([0.5, 1.0, 0.0, 1.0])
    assert best_of_n(rewards).tolist() == [0, 1, 0, 0]  # of equal ones the first
    assert best_of_n(rewards, 3).tolist() == [1, 1, 0, 1]
    assert best_of_n(rewards, 3, above=0.5).tolist() == [0, 1, 0, 1]
    assert best_of_n(torch.zeros(3), above=0.0).tolist() == [0, 0, 0]  # nothing was right: nothing is learnt
    assert best_of_n(torch.tensor([2.0])).tolist() == [1]
    with pytest.raises(RewardError):
        best_of_n(torch.tensor([1.0, math.inf]))


def test_batch_normalised_by_hand():
    # values 1, 4, 9 for 2, 1, 0 tokens: mean 2, variance (2 * 1 + 4) / 3 = 2
    found = batch_normalised(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([2.0, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([-1 / 2**0.5, 2 / 2**0.5, 7 / 2**0.5], rel=1e-5)
    assert batch_normalised(torch.full((3,), 0.1 + 0.2), torch.ones(3)).tolist() == [0, 0, 0]
    assert batch_normalised(torch.tensor([1.0, 2.0]), torch.zeros(2)).tolist() == [0, 0]
    with pytest.raises(RewardError, match="not finite"):
        batch_normalised(torch.tensor([1.0, math.nan]), torch.ones(2))
