"""Length penalties, from 0 down to -1, in tokens of the completion (its stop token included)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_mega.config.reward import LengthOptions, SoftOverlongOptions

# (text, answer, row, token_ids=...) -> the reward
LengthFunction = Callable[..., float]


def length(options: LengthOptions, max_completion_tokens: int) -> LengthFunction:
    """0 up to `start` tokens, -1 from `end` tokens on (default: max_completion_tokens); between them, with
    x = (tokens - start) / (end - start): -x (linear) or -(1 - cos(pi x)) / 2 (cosine).

    start < end is the recipe's to check (`RewardConfig.check_lengths`).
    """
    start, end = options.start, options.end or max_completion_tokens

    def score(completion: str, answer: str | None, row: Mapping[str, Any], *, token_ids: Sequence[int]) -> float:
        x = min(max((len(token_ids) - start) / (end - start), 0.0), 1.0)
        return -x if options.shape == "linear" else -(1 - math.cos(math.pi * x)) / 2

    return score


def soft_overlong(options: SoftOverlongOptions, max_completion_tokens: int) -> LengthFunction:
    """DAPO's soft overlong punishment, arXiv:2503.14476, equation 13, with L_max = max_completion_tokens:

        0                                   for |y| <= L_max - L_cache
        ((L_max - L_cache) - |y|) / L_cache   for L_max - L_cache < |y| <= L_max
        -1                                  beyond, where no completion is

    which is the linear penalty from L_max - L_cache to L_max. L_cache <= L_max is the recipe's to check.
    """
    start = max_completion_tokens - options.cache
    return length(LengthOptions(shape="linear", start=start), max_completion_tokens)
