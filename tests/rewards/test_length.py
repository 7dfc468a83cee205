from __future__ import annotations

import pytest

from grpo_mega.config.reward import LengthOptions, SoftOverlongOptions
from grpo_mega.rewards.length import length, soft_overlong


def of(reward, tokens):
    return reward("text is not counted", None, {}, token_ids=tuple(range(tokens)))


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, {0: 0.0, 1: -0.01, 50: -0.5, 100: -1.0}),  # to sampling.max_completion_tokens=100
        ({"start": 20, "end": 60}, {20: 0.0, 21: -0.025, 40: -0.5, 60: -1.0, 61: -1.0, 100: -1.0}),
        ({"start": 20, "end": 220}, {20: 0.0, 100: -0.4}),
        # (1 - cos(pi x)) / 2 at x = 1/3, 1/2, 2/3
        ({"shape": "cosine", "start": 10, "end": 70}, {0: 0.0, 10: 0.0, 30: -0.25, 40: -0.5, 50: -0.75, 70: -1.0}),
        ({"shape": "cosine"}, {0: 0.0, 100: -1.0}),
    ],
    ids=str,
)
def test_length_by_hand(options, values):
    reward = length(LengthOptions(**options), 100)
    assert {tokens: of(reward, tokens) for tokens in values} == pytest.approx(values, abs=1e-15)


def test_soft_overlong_is_daposs_equation_13():
    """arXiv:2503.14476, section 4.1: L_max = 20480, L_cache = 4096."""
    reward = soft_overlong(SoftOverlongOptions(cache=4096), 20480)
    expected = {1: 0.0, 16384: 0.0, 16385: -1 / 4096, 17408: -0.25, 18432: -0.5, 20480: -1.0}
    assert {tokens: of(reward, tokens) for tokens in expected} == expected
    whole = soft_overlong(SoftOverlongOptions(cache=100), 100)
    assert [of(whole, n) for n in (0, 25, 100)] == [0.0, -0.25, -1.0]
