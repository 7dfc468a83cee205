"""Sampling noise that depends on what is sampled, never on where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def uniforms(seed: int, step: int, prompt: int, completion: int, count: int) -> Tensor:
    """`[count]` float64 in [0, 1): number i decides the completion's token i.

    Philox4x64-10 (Salmon et al., SC 2011) with key (seed, step) and a counter that starts at (0, completion, prompt),
    four numbers a count: any rank computes any row's noise without having drawn another's. Prompt indices may be
    negative (held-out problems).
    """
    key = np.array([seed & _WORD, step & _WORD], dtype=np.uint64)
    counter = np.array([0, completion & _WORD, prompt & _WORD, 0], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count))
