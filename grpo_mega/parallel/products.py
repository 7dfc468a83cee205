"""The head's matrix products, with results in max(float32, dtype): logits must not be rounded to bf16's 8 bits.

A bf16 product of torch accumulates in float32 and then rounds its result, which moves a log-prob by about 1e-2, as much
as a whole clip range of some recipes. On CUDA the product itself can return float32. torch's CPU kernels cannot, so
there a float32 copy of the weights is made, a block of them at a time.

Results go into memory that is there already wherever they are large: on a CPU fresh pages cost as much as the product
of a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_mega.parallel import onednn

BLOCK_ELEMENTS = 1 << 22  # of weights, or of their gradient, held beside the operands at a time: 16 MiB in float32


def rows_by_rows(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [n, k] @ right [m, k]^T -> [n, m] in max(float32, dtype), into `out` if given; operands of one dtype."""
    product = None if out is not None else onednn.by_packed(left, right)
    if product is not None:
        return product
    wide = torch.promote_types(right.dtype, torch.float32)
    if out is None:
        if right.dtype == wide:
            return left @ right.t()
        out = torch.empty(len(left), len(right), dtype=wide, device=left.device)
    if left.is_cuda:
        return _on_cuda(left, right.t(), out)
    if right.dtype == wide and not onednn.is_faster_for_large_products():
        return torch.mm(left, right.t(), out=out)
    left = left.to(wide)
    for block in _blocks(right):
        out[:, block] = left @ right[block].to(wide).t()
    return out


def through_rows(left: Tensor, right: Tensor) -> Tensor:
    """left [n, m] @ right [m, k] -> [n, k] in max(float32, right.dtype).

    left: of that dtype, or on CUDA of right's, which is what tensor cores multiply.
    """
    wide = torch.promote_types(right.dtype, torch.float32)
    if left.is_cuda:
        out = torch.empty(len(left), right.shape[1], dtype=wide, device=left.device)
        return _on_cuda(left.to(right.dtype), right, out)
    if right.dtype == wide:
        return left @ right
    out = torch.zeros(len(left), right.shape[1], dtype=wide)
    for block in _blocks(right):
        out += left[:, block] @ right[block].to(wide)
    return out


def accumulate_(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target [m, k] += left [n, m]^T @ right [n, k], summed in max(float32, dtype); operands as in `through_rows`."""
    wide = torch.promote_types(right.dtype, torch.float32)
    if left.is_cuda:
        left = left.to(right.dtype)
        for block in _blocks(target):
            out = torch.empty(target[block].shape, dtype=wide, device=left.device)
            target[block] += _on_cuda(left[:, block].t(), right, out)
        return
    right = right.to(wide)
    if target.dtype == wide and not onednn.is_faster_for_large_products():
        target.addmm_(left.t(), right)
        return
    for block in _blocks(target):
        target[block] += left[:, block].t() @ right


def _on_cuda(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return (slice(start, start + size) for start in range(0, len(matrix), size))
