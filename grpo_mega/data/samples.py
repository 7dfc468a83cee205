"""Groups -> samples: the advantage and the normalization's weight, on every token of a completion."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.objective.normalization import completion_weights
from grpo_mega.types import Group, Rollout, Sample


def samples_from(
    groups: Sequence[Group], positions: Sequence[int], *, normalization: str, max_completion_tokens: int
) -> tuple[list[Sample], int]:
    """One Sample for every rollout of every group, and what these groups add to the normalization's denominator D.

    positions[k] is the place of groups[k] among all prompts of the step, over all ranks; rollout i of it gets
    order = positions[k] * G + i, so the order is prompt-major and no layout changes it.

    Advantages are the rollouts' (`data/advantages`). One with `counts` False has length 0 to the normalization, weight
    0.0 and a loss_mask that is False throughout.

    Raises ValueError for groups of unequal size, a rollout without advantage, an empty completion, or log-probs that do
    not match its tokens.
    """
    if len(groups) != len(positions):
        raise ValueError(f"{len(groups)} groups came with {len(positions)} positions; give one position a group")
    sizes = {len(group.rollouts) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"groups have unequal sizes {sorted(sizes)}; every group of a step holds G rollouts")
    lengths = [[len(r.completion.token_ids) if r.counts else 0 for r in group.rollouts] for group in groups]
    weights, denominator = completion_weights(normalization, lengths, max_completion_tokens)
    samples = []
    for group, position, group_weights in zip(groups, positions, weights, strict=True):
        for i, rollout in enumerate(group.rollouts):
            order = position * len(group.rollouts) + i
            samples.append(_sample(order, position, group.prompt.token_ids, rollout, group_weights[i]))
    return samples, denominator


def _sample(order: int, group: int, prompt: tuple[int, ...], rollout: Rollout, weight: float) -> Sample:
    completion, advantage = rollout.completion, rollout.advantage
    n, m = len(prompt), len(completion.token_ids)
    if advantage is None or (isinstance(advantage, tuple) and len(advantage) != m):
        raise ValueError(f"sample {order} of {m} completion tokens has the advantages {advantage}")
    if m == 0 or len(completion.sampler_logprobs) != m:
        raise ValueError(
            f"sample {order}: the completion has {m} tokens and {len(completion.sampler_logprobs)} sampler log-probs; "
            "a sampler returns at least one token, and one log-prob a token"
        )
    return Sample(
        order=order,
        group=group,
        prompt_tokens=n,
        token_ids=prompt + completion.token_ids,
        loss_mask=(False,) * n + (rollout.counts,) * m,
        sampler_logprobs=(0.0,) * n + completion.sampler_logprobs,
        advantage=advantage,
        weight=weight,
        kept=completion.kept,
    )
