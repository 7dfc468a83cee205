"""Oracles by hand: prompt 0 has 2 and 6 tokens and a dropped completion, prompt 1 has 4, 4 and 8, prompt 2 nothing."""

from __future__ import annotations

import pytest

from grpo_mega.errors import ConfigError
from grpo_mega.objective.normalization import NORMALIZATIONS, completion_weights

LENGTHS = [[2, 0, 6], [4, 4, 8], [0, 0, 0]]
MAX = 16

EXPECTED = {
    # G_0 = 2: 1/(2*2), 1/(2*6); G_1 = 3: 1/(3*4), 1/(3*4), 1/(3*8); D = 2 prompts
    "sequence": ([[1 / 4, 0.0, 1 / 12], [1 / 12, 1 / 12, 1 / 24], [0.0, 0.0, 0.0]], 2),
    # 2 + 6 = 8 tokens, 4 + 4 + 8 = 16 tokens; D = 2 prompts
    "group_token": ([[1 / 8, 0.0, 1 / 8], [1 / 16, 1 / 16, 1 / 16], [0.0, 0.0, 0.0]], 2),
    # D = 8 + 16 tokens
    "token": ([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], 24),
    # D = 2 + 3 completions
    "constant": ([[1 / 16, 0.0, 1 / 16], [1 / 16, 1 / 16, 1 / 16], [0.0, 0.0, 0.0]], 5),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_unequal_and_dropped(name: str):
    weights, denominator = completion_weights(name, LENGTHS, MAX)
    assert weights == EXPECTED[name][0]
    assert denominator == EXPECTED[name][1]
    assert type(denominator) is int  # it is summed over ranks as an integer


@pytest.mark.parametrize("name", ["sequence", "group_token", "token"])
def test_these_are_averages(name: str):
    # The mean of a loss that is 1 everywhere is 1: sum_i w_i |o_i| = D. (constant: only if all reach the length limit.)
    weights, denominator = completion_weights(name, LENGTHS, MAX)
    total = sum(w * n for ws, ns in zip(weights, LENGTHS, strict=True) for w, n in zip(ws, ns, strict=True))
    assert total == pytest.approx(denominator)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_prompts_may_lie_on_any_rank(name: str):
    parts = [completion_weights(name, [group], MAX) for group in LENGTHS]
    whole = completion_weights(name, LENGTHS, MAX)
    assert whole == ([weights for part, _ in parts for weights in part], sum(count for _, count in parts))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_nothing_here(name: str):
    assert completion_weights(name, [], MAX) == ([], 0)
    assert completion_weights(name, [[0, 0]], MAX) == ([[0.0, 0.0]], 0)


def test_unknown_name():
    with pytest.raises(ConfigError, match="'tokens' is unknown; use one of sequence, group_token, token, constant"):
        completion_weights("tokens", LENGTHS, MAX)


@pytest.mark.parametrize("length", [-1, MAX + 1])
def test_impossible_length(length: int):
    with pytest.raises(ConfigError, match=f"completion 1 of prompt 1 has length {length}"):
        completion_weights("token", [[3], [2, length]], MAX)
