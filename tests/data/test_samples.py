from __future__ import annotations

import math

import pytest

from grpo_mega.config import GrpoConfig
from grpo_mega.data.advantages import with_advantages
from grpo_mega.data.samples import samples_from
from grpo_mega.types import Completion, Group, Prompt, Rollout


def rollout(tokens, reward, counts=True):
    completion = Completion(tuple(tokens), tuple(-0.1 * token for token in tokens), "stop")
    return Rollout(completion, reward, counts=counts)


def group(index, prompt, *rollouts):
    return Group(Prompt(index=index, text="", token_ids=tuple(prompt)), tuple(rollouts))


# rewards 1, 0, 0, 1: mean 1/2, population std 1/2, advantages +1, -1, -1, +1; the third completion does not count
FIRST = group(
    0, [1, 2], rollout([3], 1.0), rollout([4, 5], 0.0), rollout([6, 7, 8], 0.0, counts=False), rollout([9], 1.0)
)
# rewards all equal: advantages 0
SECOND = group(1, [1], *[rollout([3, 3], 0.5)] * 4)


def build(groups=(FIRST, SECOND), positions=(5, 2), normalization="sequence"):
    groups = with_advantages(groups, GrpoConfig())
    return samples_from(groups, positions, normalization=normalization, max_completion_tokens=4)


def test_a_sample_holds_prompt_and_completion_with_mask_and_logprobs_aligned():
    samples, _ = build()
    assert samples[1].token_ids == (1, 2, 4, 5)
    assert samples[1].loss_mask == (False, False, True, True)
    assert samples[1].sampler_logprobs == (0.0, 0.0, -0.4, -0.5)


def test_a_completion_that_does_not_count_keeps_its_tokens_and_its_reward_but_no_weight():
    samples, _ = build()
    assert samples[2].token_ids == (1, 2, 6, 7, 8)
    assert samples[2].loss_mask == (False,) * 5 and samples[2].weight == 0.0
    assert [sample.advantage for sample in samples[:4]] == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert [sample.advantage for sample in samples[4:]] == [0.0] * 4


def test_the_order_is_prompt_major_over_the_whole_step():
    assert [sample.order for sample in build()[0]] == [20, 21, 22, 23, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("normalization", "weights", "denominator"),
    [
        ("sequence", [1 / 3, 1 / 6, 0, 1 / 3] + [1 / 8] * 4, 2),  # 3 and 4 completions count
        ("group_token", [1 / 4, 1 / 4, 0, 1 / 4] + [1 / 8] * 4, 2),  # 4 and 8 tokens count
        ("token", [1, 1, 0, 1, 1, 1, 1, 1], 12),
        ("constant", [1 / 4, 1 / 4, 0, 1 / 4] + [1 / 4] * 4, 7),
    ],
)
def test_weights_and_denominator_of_each_normalization(normalization, weights, denominator):
    samples, count = build(normalization=normalization)
    assert [sample.weight for sample in samples] == pytest.approx(weights)
    assert count == denominator and type(count) is int


def test_sequence_weights_of_all_trained_tokens_sum_to_the_denominator():
    samples, count = build()
    assert math.isclose(sum(sample.weight * sum(sample.loss_mask) for sample in samples), count)


def test_no_groups_no_samples():
    assert build((), ()) == ([], 0)


def test_broken_contracts_are_refused():
    with pytest.raises(ValueError, match=r"2 groups came with 1 positions"):
        build(positions=(0,))
    with pytest.raises(ValueError, match=r"unequal sizes \[3, 4\]"):
        build((FIRST, group(2, [1], *[rollout([3], 0.0)] * 3)))
    with pytest.raises(ValueError, match=r"sample 1: the completion has 0 tokens .*at least one token"):
        build([group(0, [1], rollout([3], 1.0), rollout([], 0.0))], [0])
    short = Rollout(Completion((3, 4), (-0.5,), "stop"), 0.0)
    with pytest.raises(ValueError, match=r"sample 7: the completion has 2 tokens and 1 sampler log-probs"):
        build([group(0, [1], rollout([3], 1.0), short)], [3])
