"""Groups -> advantages by hand: each estimator, penalties in the reward, and what does not count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo_mega.config import GrpoConfig
from grpo_mega.data.advantages import with_advantages
from grpo_mega.types import Completion, Group, Prompt, Rollout


def group(index, *rollouts):
    """rollouts: (reward, tokens) or (reward, tokens, steps) or (reward, tokens, (), counts)."""
    made = []
    for reward, tokens, *more in rollouts:
        completion = Completion((1,) * tokens, (0.0,) * tokens, "stop")
        steps = more[0] if more else ()
        made.append(Rollout(completion, reward, steps=steps, counts=more[1] if len(more) > 1 else True))
    return Group(Prompt(index, "", (1,)), tuple(made))


def advantages(groups, penalties=None, **grpo):
    settings = {"group_size": len(groups[0].rollouts), "kl_coef": 0.0} | grpo
    found = with_advantages(groups, GrpoConfig(**settings), penalties)
    return [rollout.advantage for one in found for rollout in one.rollouts]


TWO = [group(0, (1.0, 2), (0.0, 1), (0.5, 3)), group(1, (4.0, 1), (0.0, 1), (2.0, 1))]
PENALISED = {"kl_coef": 0.5, "kl_estimator": "k1", "kl_in": "reward"}


def test_each_group_by_itself():
    root = (1 / 6) ** 0.5  # the population's std of 0, 1/2, 1
    assert advantages(TWO) == pytest.approx([0.5 / root, -0.5 / root, 0] * 2, rel=1e-5, abs=1e-9)
    assert advantages(TWO, advantage="dr_grpo") == [0.5, -0.5, 0, 2, -2, 0]
    assert advantages(TWO, advantage="rloo") == pytest.approx([0.75, -0.75, 0, 3, -3, 0])


def test_a_penalty_is_taken_off_before_anything_is_normalised():
    # rewards 1 - 0.5 (0.2 + 0.4), 0 - 0.5 * 1, 0.5 (no penalty known): 0.7, -0.5, 0.5; mean 0.7 / 3
    penalties = {0: np.array([0.2, 0.4]), 1: np.array([1.0])}
    found = advantages(TWO[:1], penalties, advantage="dr_grpo", **PENALISED)
    assert found == pytest.approx([0.7 - 0.7 / 3, -0.5 - 0.7 / 3, 0.5 - 0.7 / 3])
    # order k * G + i: 3 is the second group's first completion
    assert advantages(TWO, {3: np.array([8.0])}, advantage="dr_grpo", **PENALISED)[3:] == pytest.approx(
        [0 - 2 / 3, 0 - 2 / 3, 2 - 2 / 3]
    )


def test_reinforce_plus_plus_gives_each_token_the_penalties_from_it_on():
    # returns of the first completion 1 - 0.5 (0.2 + 0.4) = 0.7 and 1 - 0.5 * 0.4 = 0.8; the others 0 and 0.5 (three
    # tokens). Mean over 6 tokens (0.7 + 0.8 + 0 + 3 * 0.5) / 6 = 0.5, variance (0.04 + 0.09 + 0.25) / 6
    penalties = {0: np.array([0.2, 0.4])}
    std = (0.38 / 6) ** 0.5
    found = advantages(TWO[:1], penalties, advantage="reinforce_plus_plus", **PENALISED)
    assert found[0] == pytest.approx((0.2 / std, 0.3 / std), rel=1e-5)
    assert found[1:] == pytest.approx([-0.5 / std, 0], rel=1e-5, abs=1e-9)


def test_the_baseline_is_the_groups_and_the_scale_the_batchs():
    # centred: 0.5, -0.5, 0 | 2, -2, 0 for 2, 1, 3, 1, 1, 1 tokens: mean 0.5 / 9
    mean = 0.5 / 9
    std = ((2 * 0.25 + 0.25 + 8) / 9 - mean**2) ** 0.5
    found = advantages(TWO, advantage="reinforce_plus_plus_baseline")
    assert found == pytest.approx([(x - mean) / std for x in (0.5, -0.5, 0, 2, -2, 0)], rel=1e-5)


def test_what_does_not_count_has_no_weight_in_the_batch():
    cut = [group(0, (1.0, 5, (), False), (0.0, 1), (1.0, 1))]  # mean of the two that count: 1/2, std 1/2
    assert advantages(cut, advantage="reinforce_plus_plus") == pytest.approx([1, -1, 1], rel=1e-5)


def test_what_is_not_imitated_does_not_count():
    (found,) = with_advantages(TWO[:1], GrpoConfig(group_size=3, kl_coef=0.0, advantage="best_of_n", best=2))
    assert [(one.advantage, one.counts) for one in found.rollouts] == [(1, True), (0, False), (1, True)]
    (none,) = with_advantages(TWO[:1], GrpoConfig(group_size=3, kl_coef=0.0, advantage="best_of_n", best_above=1.0))
    assert not any(one.counts for one in none.rollouts)
    above = {"group_size": 3, "kl_coef": 0.0, "advantage": "best_of_n", "best_above": 0.25}
    (right,) = with_advantages(TWO[:1], GrpoConfig(**above))  # all that are right
    assert [one.counts for one in right.rollouts] == [True, False, True]


def test_a_failed_reward_is_never_the_best():
    made = group(0, (0.0, 1), (-0.5, 1), (3.0, 2, (), False))
    failed = [replace(made, rollouts=(replace(made.rollouts[0], error="TypeError: no"), *made.rollouts[1:]))]
    settings = {"group_size": 3, "kl_coef": 0.0}
    (found,) = with_advantages(failed, GrpoConfig(advantage="best_of_n", **settings))
    assert [(one.advantage, one.counts) for one in found.rollouts] == [(0, False), (1, True), (0, False)]
    (found,) = with_advantages(failed, GrpoConfig(advantage="reinforce_plus_plus", **settings))
    assert [one.counts for one in found.rollouts] == [False, True, False]


def test_steps_give_each_token_its_own():
    # step rewards 1 and 0 that end at tokens 0 and 2 of 3, and 0 at the end of 1: mean 1/3
    one = [group(0, (0.5, 3, ((0, 1.0), (2, 0.0))), (0.0, 1, ((0, 0.0),)))]
    first, second = advantages(one, advantage="dr_grpo")
    assert first == pytest.approx((1 - 2 / 3, -1 / 3, -1 / 3)) and second == pytest.approx((-1 / 3,))
