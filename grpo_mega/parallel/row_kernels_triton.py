"""The row kernels of `row_kernels` in Triton: a program a row, which walks through the row's columns in order.

On a CPU they run under Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time
WARPS = 8


@triton.jit
def _statistics(z, column, result, stride, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One pass: when the maximum grows to M, s and e so far become s f and f (e + (m - M) s), f = exp(m - M)."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    m = tl.full((), -1.0e38, WIDE)
    s = tl.zeros((), WIDE)
    e = tl.zeros((), WIDE)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = tl.load(z + at, mask=inside, other=-float("inf"))
        top = tl.maximum(m, tl.max(x, axis=0))
        shifted = tl.where(inside, x - top, 0.0)
        p = tl.where(inside, tl.exp(shifted), 0.0)
        rescale = tl.exp(m - top)
        e = rescale * (e + (m - top) * s) + tl.sum(p * shifted, axis=0)
        s = s * rescale + tl.sum(p, axis=0)
        m = top
    target = tl.load(column + row)
    z_y = tl.load(z + tl.maximum(target, 0), mask=target >= 0, other=0.0)
    tl.store(result + row * 4, m)
    tl.store(result + row * 4 + 1, s)
    tl.store(result + row * 4 + 2, e)
    tl.store(result + row * 4 + 3, z_y)


@triton.jit
def _gradient(
    z, out, column, log_z, entropies, g_y, g_h, stride, out_stride, columns,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out` may be a narrower view of z's memory: element j is written behind no element that is still to be read."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    out += row * out_stride
    target = tl.load(column + row)
    shift = tl.load(log_z + row)
    gain = tl.load(g_y + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        logp = tl.load(z + at, mask=inside, other=0.0) - shift
        coefficient = -gain
        if HAS_ENTROPY:
            coefficient = -gain - tl.load(g_h + row) * (logp + tl.load(entropies + row))
        value = tl.exp(logp) * coefficient + tl.where(at == target, gain, 0.0)
        tl.debug_barrier()  # all of this block is read before any of it is overwritten
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()


def statistics(z: Tensor, column: Tensor) -> Tensor:
    """See `row_kernels.statistics`."""
    result = z.new_empty(z.shape[0], 4)
    if z.shape[1] == 0:
        result.zero_()[:, 0] = torch.finfo(z.dtype).min / 2
        return result
    if z.shape[0]:
        wide = tl.float64 if z.dtype == torch.float64 else tl.float32
        _statistics[(z.shape[0],)](
            z, column, result, z.stride(0), z.shape[1], WIDE=wide, BLOCK=BLOCK, num_warps=WARPS
        )  # fmt: skip
    return result


def gradient(
    z: Tensor, column: Tensor, log_z: Tensor, entropies: Tensor, g_y: Tensor, g_h: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `row_kernels.gradient`."""
    out = z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]
    if z.numel():
        _gradient[(z.shape[0],)](
            z, out, column, log_z, entropies, g_y, g_y if g_h is None else g_h, z.stride(0), out.stride(0), z.shape[1],
            HAS_ENTROPY=g_h is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out
