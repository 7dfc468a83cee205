"""What happens to a tile of logits between the matrix products: four numbers a row, then its gradient in its place.

A tile is z [c, P] in float32 or float64, this rank's logits of c rows after temperature, scaling and soft-cap. The same
two functions exist in torch here and in Triton (`row_kernels_triton`); CUDA tensors go to Triton's.

    statistics:  m = max_j z_j,  s = sum_j exp(z_j - m),  e = sum_j exp(z_j - m) (z_j - m),  z_y
    gradient:    dL/dz_j = g_y (1[j = y] - p_j) - g_H p_j (ln p_j + H),  p_j = exp(z_j - ln Z)
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # of a tile that stay in a processor's cache while several passes run over them


def statistics(z: Tensor, column: Tensor) -> Tensor:
    """[c, 4]: (m, s, e, z_y) of each row; z_y is 0 where `column` [c] int64, the target's, is -1: on another rank."""
    if z.is_cuda:
        from grpo_mega.parallel import row_kernels_triton

        return row_kernels_triton.statistics(z, column)
    result = z.new_empty(z.shape[0], 4)
    if z.shape[1] == 0:  # no mass; not -inf, which times 0 is nan
        result.zero_()[:, 0] = torch.finfo(z.dtype).min / 2
        return result
    result[:, 3] = torch.where(column >= 0, z.gather(1, column.clamp(min=0)[:, None])[:, 0], 0.0)
    for rows, shifted, p in _in_blocks(z):
        m = torch.amax(z[rows], dim=1)
        torch.sub(z[rows], m[:, None], out=shifted)
        torch.exp(shifted, out=p)
        result[rows, 0], result[rows, 1], result[rows, 2] = m, p.sum(dim=1), torch.linalg.vecdot(p, shifted)
    return result


def gradient(
    z: Tensor, column: Tensor, log_z: Tensor, entropies: Tensor, g_y: Tensor, g_h: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dL/dz [c, P] in z's memory; log_z, entropies, g_y = dL/d logprob, g_h = dL/d entropy (None: 0), [c] each.

    dtype: z's, or on CUDA bf16, which is what the products that follow take: half the memory is then left unused.
    """
    if z.is_cuda:
        from grpo_mega.parallel import row_kernels_triton

        return row_kernels_triton.gradient(z, column, log_z, entropies, g_y, g_h, dtype)
    for rows, shifted, p in _in_blocks(z):
        torch.sub(z[rows], log_z[rows, None], out=shifted)
        torch.exp(shifted, out=p)
        if g_h is None:
            torch.mul(p, -g_y[rows, None], out=z[rows])
        else:  # one coefficient an element: -(g_y + g_H (ln p + H))
            shifted.add_(entropies[rows, None]).mul_(-g_h[rows, None]).sub_(g_y[rows, None])
            torch.mul(p, shifted, out=z[rows])
    mine = (column >= 0).nonzero()[:, 0]
    z[mine, column[mine]] += g_y[mine]
    return z


def _in_blocks(z: Tensor):
    """(rows, two scratch tensors of their shape), a few rows at a time; a loop over nothing if z has no elements."""
    if z.numel() == 0:
        return
    size = min(max(1, BLOCK_ELEMENTS // z.shape[1]), z.shape[0])
    scratch = z.new_empty(2, size, z.shape[1])
    for start in range(0, z.shape[0], size):
        count = min(size, z.shape[0] - start)
        yield slice(start, start + count), scratch[0, :count], scratch[1, :count]
