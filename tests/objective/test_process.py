"""Process supervision by hand, from DeepSeekMath, section 4.1.3."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.errors import ConfigError, RewardError
from grpo_mega.objective.process import process_advantages


def test_a_token_gets_the_normalised_rewards_of_the_steps_that_end_at_it_or_later():
    # R = {1, 0, 0, 1}: mean 1/2, std 1/2, so r~ = +1, -1 | -1 | +1.
    # completion 0: steps end at tokens 1 and 3 of 4: tokens 0, 1 get 1 - 1 = 0, tokens 2, 3 get -1
    # completion 1: one step that ends at token 0 of 3: -1, then nothing
    # completion 2: one step at the end of 2
    found = process_advantages([[1, 0], [0], [1]], [[1, 3], [0], [1]], [4, 3, 2])
    assert [values.tolist() for values in found] == [
        pytest.approx([0, 0, -1, -1], abs=1e-5), pytest.approx([-1, 0, 0], abs=1e-5), pytest.approx([1, 1], abs=1e-5)
    ]  # fmt: skip
    centred = process_advantages([[1, 0], [0], [1]], [[1, 3], [0], [1]], [4, 3, 2], scale=False)
    assert [values.tolist() for values in centred] == [[0, 0, -0.5, -0.5], [-0.5, 0, 0], [0.5, 0.5]]


def test_the_std_is_of_all_steps_together():
    # R = {3, 0, 0}: mean 1, std sqrt(2): 2 / sqrt(2) and -1 / sqrt(2) twice. Steps of one completion add up: the first
    # token of completion 0 is worth 2 - 1 over sqrt(2)
    (first, second) = process_advantages([[3, 0], [0]], [[0, 1], [0]], [2, 1])
    assert first.tolist() == pytest.approx([1 / 2**0.5, -1 / 2**0.5], rel=1e-5)
    assert second.tolist() == pytest.approx([-1 / 2**0.5], rel=1e-5)


def test_one_step_a_completion_is_outcome_supervision():
    from grpo_mega.objective.advantages import group_advantages

    rewards = [0.3, 1.0, -2.0]
    found = process_advantages([[r] for r in rewards], [[2], [0], [1]], [3, 1, 2])
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    assert [set(values.tolist()) for values in found] == [{value} for value in expected]


def test_equal_step_rewards_teach_nothing_exactly():
    found = process_advantages([[0.1 + 0.2, 0.1 + 0.2], [0.1 + 0.2]], [[0, 1], [0]], [2, 1])
    assert all(torch.count_nonzero(values) == 0 for values in found)


@pytest.mark.parametrize("ends", [[0], [1, 0], [0, 0], [0, 2]])
def test_steps_that_do_not_fit(ends):
    with pytest.raises(ConfigError, match="completion 0 of 2 tokens has 2 step rewards for steps that end at"):
        process_advantages([[1, 0], [0]], [ends, [0]], [2, 1])


def test_rewards_that_are_no_numbers():
    with pytest.raises(RewardError, match="no finite standard deviation"):
        process_advantages([[float("nan")], [0]], [[0], [0]], [1, 1])
