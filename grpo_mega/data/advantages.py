"""Scored groups -> groups whose rollouts carry their advantages; all of a step at once, as some are over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from grpo_mega.config import GrpoConfig
from grpo_mega.objective import advantages as of
from grpo_mega.objective.process import process_advantages
from grpo_mega.types import Group, Rollout

Penalties = Mapping[int, np.ndarray]  # order of a sample -> the KL estimate of each of its tokens, nats


def with_advantages(groups: Sequence[Group], grpo: GrpoConfig, penalties: Penalties | None = None) -> list[Group]:
    """The groups, each rollout with its advantage: a number, or one a token where rewards differ within a completion.

    groups: all of the step's, in its global order, so that rollout i of group k has order k * G + i. penalties: of a KL
    term in the reward; one that is not there is 0. Outcome rewards become r_i - kl_coef * sum_t KL_t before anything is
    normalised; under reinforce_plus_plus token t's return is r_i - kl_coef * sum_{s >= t} KL_s. Rollouts with steps are
    under process supervision; under best_of_n those that were not chosen do not count. Raises RewardError for rewards
    that are not finite.
    """
    if not groups:
        return []
    kl_coef, size = grpo.kl_coef, len(groups[0].rollouts)
    penalties = penalties or {}
    if grpo.advantage in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        return _over_batch(groups, grpo, penalties)
    result = []
    for k, group in enumerate(groups):
        if grpo.advantage == "best_of_n":
            result.append(_imitated(group, grpo))
            continue
        if any(rollout.steps for rollout in group.rollouts):
            values: Sequence[float | tuple[float, ...]] = _process(group.rollouts, grpo)
        else:
            rewards = [
                rollout.reward - kl_coef * float(np.sum(penalties.get(k * size + i, 0.0)))
                for i, rollout in enumerate(group.rollouts)
            ]
            values = _outcome(torch.tensor(rewards, dtype=torch.float64), grpo).tolist()
        result.append(_attached(group, values))
    return result


def _outcome(rewards: Tensor, grpo: GrpoConfig) -> Tensor:
    match grpo.advantage:
        case "dr_grpo":
            return of.centred_advantages(rewards)
        case "rloo":
            return of.leave_one_out_advantages(rewards)
        case _:
            return of.group_advantages(rewards)


def _process(rollouts: Sequence[Rollout], grpo: GrpoConfig) -> list[tuple[float, ...]]:
    found = process_advantages(
        [[value for _, value in rollout.steps] for rollout in rollouts],
        [[end for end, _ in rollout.steps] for rollout in rollouts],
        [len(rollout.completion.token_ids) for rollout in rollouts],
        scale=grpo.advantage == "grpo",
    )
    return [tuple(values.tolist()) for values in found]


def _over_batch(groups: Sequence[Group], grpo: GrpoConfig, penalties: Penalties) -> list[Group]:
    """REINFORCE++ and its baseline: returns of all tokens of the step that count, normalised together.

    Without a group's mean a failed reward's 0 is no baseline's neighbour but a verdict: such completions do not count.
    """
    if grpo.advantage == "reinforce_plus_plus":
        groups = [replace(group, rollouts=tuple(map(_unless_failed, group.rollouts))) for group in groups]
    returns, weights = [], []
    for k, group in enumerate(groups):
        own = [penalties.get(k * len(group.rollouts) + i) for i in range(len(group.rollouts))]
        rewards = [rollout.reward for rollout in group.rollouts]
        if grpo.advantage == "reinforce_plus_plus_baseline":
            penalised = [
                r if p is None else r - grpo.kl_coef * float(p.sum()) for r, p in zip(rewards, own, strict=True)
            ]
            rewards, own = (
                of.centred_advantages(torch.tensor(penalised, dtype=torch.float64)).tolist(),
                [None] * len(own),
            )
        for rollout, reward, penalty in zip(group.rollouts, rewards, own, strict=True):
            length = len(rollout.completion.token_ids) if rollout.counts else 0
            if penalty is None:  # one return for all its tokens
                returns.append(torch.tensor([reward], dtype=torch.float64))
                weights.append(torch.tensor([float(length)]))
            else:
                later = torch.from_numpy(penalty.astype(np.float64)).flip(0).cumsum(0).flip(0)
                returns.append(reward - grpo.kl_coef * later)
                weights.append(torch.ones(length))
    normalised = of.batch_normalised(torch.cat(returns), torch.cat(weights)).split([len(part) for part in returns])
    values = iter(part.item() if len(part) == 1 else tuple(part.tolist()) for part in normalised)
    return [_attached(group, [next(values) for _ in group.rollouts]) for group in groups]


def _unless_failed(one: Rollout) -> Rollout:
    return replace(one, counts=one.counts and one.error is None)


def _imitated(group: Group, grpo: GrpoConfig) -> Group:
    """The best get 1, and only they count: the mean is over their tokens. One whose reward failed is not known to be
    good, and one that does not count is no choice."""
    choice = [i for i, one in enumerate(group.rollouts) if one.counts and one.error is None]
    values = [0.0] * len(group.rollouts)
    if choice:
        rewards = torch.tensor([group.rollouts[i].reward for i in choice], dtype=torch.float64)
        best = grpo.best or (1 if grpo.best_above is None else len(choice))
        for i, value in zip(choice, of.best_of_n(rewards, best, grpo.best_above).tolist(), strict=True):
            values[i] = value
    rollouts = (replace(one, counts=one.advantage == 1.0) for one in _attached(group, values).rollouts)
    return replace(group, rollouts=tuple(rollouts))


def _attached(group: Group, values: Sequence[float | tuple[float, ...]]) -> Group:
    rollouts = (replace(one, advantage=value) for one, value in zip(group.rollouts, values, strict=True))
    return replace(group, rollouts=tuple(rollouts))
