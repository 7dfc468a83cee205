"""float32 matrix products by oneDNN on a CPU, where torch 2.13 takes MKL's.

On AMD's AVX-512 cores oneDNN multiplies more than twice as fast (222 against 96 GFLOP/s a core for [490, 576] x
[576, 3072]), forward and both gradients, at float32's full precision; torch itself sends only bf16 and fp16 there.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

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


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] @ right [k, m]; whatever is not a float32 product of some size goes to torch's own kernel."""
    matrices = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    if matrices and left.dtype == right.dtype == torch.float32 and left.numel() and right.numel():
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(left.shape[0], right.shape[-1]))
