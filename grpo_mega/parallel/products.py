"""Matrix products of bf16 operands with a float32 result: the head's, whose logits must not be rounded to 8 bits.

A bf16 product of torch accumulates in float32 and then rounds its result, which moves a log-prob by about 1e-2, as much
as a whole clip range of some recipes. On CUDA the product itself can return float32. torch's CPU kernels cannot,
so there a float32 copy of the weights is made, a block of them at a time. Other dtypes go to torch as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.parallel import onednn

BLOCK_ELEMENTS = 1 << 24  # of weights held in float32 at a time on a CPU: 64 MiB


def rows_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] @ right [m, k]^T -> [n, m] in max(float32, dtype); both of one dtype."""
    if right.dtype.itemsize >= 4:
        return left @ right.t()
    if left.is_cuda:
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    product = onednn.by_packed(left, right)
    if product is not None:
        return product
    left = left.float()
    out = torch.empty(len(left), len(right), dtype=torch.float32)
    for block in _blocks(right):
        out[:, block] = left @ right[block].float().t()
    return out


def through_rows(left: Tensor, right: Tensor) -> Tensor:
    """left [n, m] @ right [m, k] -> [n, k] in left's dtype, max(float32, right.dtype).

    On CUDA bf16 `right` takes `left` as bf16, too, which is what tensor cores multiply; the sum is float32.
    """
    if right.dtype.itemsize >= 4:
        return left @ right
    if left.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    out = torch.zeros(len(left), right.shape[1], dtype=torch.float32)
    for block in _blocks(right):
        out += left[:, block] @ right[block].float()
    return out


def _blocks(matrix: Tensor):
    size = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return (slice(start, start + size) for start in range(0, len(matrix), size))
