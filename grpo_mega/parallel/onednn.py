"""Matrix products on a CPU by oneDNN in float32, where torch 2.13 takes slower kernels.

- float32: torch sends these to MKL. On AMD's AVX-512 cores oneDNN multiplies more than twice as fast (222 against 96
  GFLOP/s a core for [490, 576] x [576, 3072]), on AVX2 cores half as fast again (65 against 45), at float32's full
  precision.
- bf16 on a processor without bf16 instructions: torch's kernel reaches 9 GFLOP/s a core there. The operands as float32
  give the very same sums (a product of two bf16 numbers is exact in float32), rounded to bf16 once, 5 times as fast.
- products of few rows with weights that stay as they are for a while, as in decoding: oneDNN otherwise lays the weight
  out anew in every product. `packed` does it once: a fifth less time at 32 rows, a third at 16.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_packed: dict[tuple[int, int, int], Tensor] = {}  # (address, rows, columns) of a weight -> its copy in oneDNN's layout
ROWS = 32  # of the products that a packed layout is chosen for; it serves any number
_library: torch.library.Library | None = None  # the override lasts as long as this object


def install() -> bool:
    """Give `aten::mm` on CPUs this module's kernel; False where torch was built without oneDNN."""
    global _library
    if _library is None and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of any override
            _library.impl("mm", _product, "CPU", allow_override=True)
    return _library is not None


@contextmanager
def packed(weights: Iterable[Tensor]) -> Iterator[None]:
    """Until its end products x @ w.T use a copy of w [m, k] in the layout that oneDNN multiplies from, in float32.

    The weights must not change meanwhile. Making a copy costs as much as about two products of 32 rows. Weights of
    other devices and dtypes, and bf16 ones where the processor multiplies bf16, are left to their own kernels.
    """
    for weight in weights:
        ours = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and not _multiplies_bf16())
        if ours and _library is not None and weight.is_cpu and weight.is_contiguous() and weight.numel():
            _packed[_key(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().float(), ROWS)
    try:
        yield
    finally:
        _packed.clear()


def by_packed(left: Tensor, right: Tensor) -> Tensor | None:
    """left [n, k] @ right [m, k]^T in float32 if `right` is `packed`, else None."""
    copy = _packed.get(_key(right)) if _packed and left.numel() else None
    return None if copy is None else torch.ops.mkldnn._linear_pointwise(left.float(), copy, None, "none", [], "")


def _key(weight: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), weight.shape[0], weight.shape[1]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] @ right [k, m]; whatever is not such a product of some size goes to torch's own kernel."""
    matrices = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    if matrices and left.dtype == right.dtype and left.numel() and right.numel():
        if _packed and right.stride(0) == 1:
            product = by_packed(left, right.t())
            if product is not None:
                return product.to(left.dtype)
        if left.dtype == torch.float32:
            return _float32(left, right)
        if left.dtype == torch.bfloat16 and not _multiplies_bf16():
            return _float32(left.float(), right.float()).bfloat16()
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(left.shape[0], right.shape[-1]))


def _float32(left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


@functools.cache
def is_faster_for_large_products() -> bool:
    """Whether oneDNN beats MKL at hundreds of rows, so that a copy of its result is worth it: with AVX-512 by 2, with
    AVX2 alone MKL's product straight into (or onto) memory that is there reaches 75 GFLOP/s a core against 70."""
    return _library is not None and torch.cpu._is_avx512_supported()


@functools.cache
def _multiplies_bf16() -> bool:
    """False on x86 processors without bf16 products (AVX-512 BF16 or AMX); elsewhere torch's own kernel is trusted."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
