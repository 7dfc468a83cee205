"""Process supervision: DeepSeekMath, arXiv:2402.03300, section 4.1.3. A reward at the end of each reasoning step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.objective.advantages import EPSILON, checked, is_degenerate


def process_advantages(
    rewards: Sequence[Sequence[float]], ends: Sequence[Sequence[int]], lengths: Sequence[int], *, scale: bool = True
) -> list[Tensor]:
    """A_{i,t} = sum of r~_i^(j) over the steps j of completion i that end at token t or after it.

    r~ = (r - mean(R)) / (std(R) + EPSILON), R being all step rewards of the group's completions together; without
    `scale` r - mean(R), as Dr. GRPO has it. rewards[i][j] is step j's, ends[i][j] the index of its last token (from 0,
    strictly ascending), lengths[i] = |o_i|. Returns a `[|o_i|]` float64 tensor for each completion. Tokens after the
    last step's end get 0: no step's reward depends on them.

    std is the population's and a group of equal step rewards gets exactly 0, as in `group_advantages`. Raises
    ConfigError for steps that do not match their rewards or lie outside the completion, and for a group with fewer
    than two steps in all; RewardError for a reward that is NaN or infinite.
    """
    for number, (values, places, length) in enumerate(zip(rewards, ends, lengths, strict=True)):
        ascending = all(a < b for a, b in zip((-1, *places), places, strict=False))
        if len(values) != len(places) or not ascending or (places and places[-1] >= length):
            raise ConfigError(
                f"completion {number} of {length} tokens has {len(values)} step rewards for steps that end at "
                f"{list(places)}; give one reward a step, and ends that ascend within the completion"
            )
    flat = torch.tensor([value for values in rewards for value in values], dtype=torch.float64)
    every, std = checked(flat)
    normalised = torch.zeros_like(every) if is_degenerate(flat) else every - every.mean()
    if scale:
        normalised = normalised / (std + EPSILON)
    result = []
    for places, length in zip(ends, lengths, strict=True):
        own, normalised = normalised[: len(places)], normalised[len(places) :]
        at_end = torch.zeros(length, dtype=torch.float64)
        at_end[torch.tensor(places, dtype=torch.int64)] = own
        result.append(at_end.flip(0).cumsum(0).flip(0))
    return result
