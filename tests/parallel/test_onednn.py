"""Products by oneDNN: float32's precision, bf16 rounded once, torch's errors, packed weights, and nothing else's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch


def products():
    """Relative errors of forward and gradients against float64, a float64 product's error, empty products."""
    from grpo_mega.parallel import onednn

    installed = onednn.install()
    torch.manual_seed(0)
    errors = []
    for n, k, m in ((1, 3, 2), (7, 576, 64), (33, 64, 1000)):
        left, right, upstream = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
        for transposed in (False, True):
            a, b = left.clone().requires_grad_(), right.t().contiguous() if transposed else right.clone()
            b.requires_grad_()
            out = a @ (b if transposed else b.t())
            out.backward(upstream)
            grad_b = b.grad.t() if transposed else b.grad
            l, r, u = left.double(), right.double(), upstream.double()
            exact = (l @ r.t(), u @ r, u.t() @ l)
            errors += [((x - y).norm() / y.norm()).item() for x, y in zip((out, a.grad, grad_b), exact, strict=True)]
    wide = torch.randn(4, 5, dtype=torch.float64)
    double = (wide @ wide.t() - (wide.unsqueeze(1) * wide).sum(2)).abs().max().item()
    empty = (torch.randn(0, 5) @ torch.randn(5, 3)).shape, (torch.randn(2, 0) @ torch.randn(0, 3)).tolist()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch.randn(2, 3) @ torch.randn(2, 3)
    return installed, max(errors), double, empty, bf16_products(onednn)


def bf16_products(onednn):
    """Largest distance from the exact product, in units of its last bf16 place; for both kinds of processor.

    Of products above 1: nearer to 0 the terms cancel, and float32's own error counts.
    """
    left, right = torch.randn(33, 576).bfloat16(), torch.randn(576, 100).bfloat16()
    exact = left.double() @ right.double()
    last_place = 2.0 ** (exact.abs().log2().floor() - 7)
    distances = []
    for answer in (True, False):
        with mock.patch.object(onednn, "_multiplies_bf16", lambda answer=answer: answer):
            product = left @ right
        assert product.dtype == torch.bfloat16
        distances.append(((product.double() - exact).abs() / last_place)[exact.abs() > 1].max().item())
    return distances


def test_products_are_float32s(ranks):
    installed, single, double, empty, bf16 = ranks(1, products)[0]
    assert installed
    # rounding of 1000 float32 sums of 1000 terms grows like their square root; how many lanes share a sum is the
    # processor's business (4e-7 with AVX-512, 6e-7 with AVX2). A bf16 or TF32 product errs by 1e-3.
    assert 1e-9 < single < 1000**0.5 * 2**-24 and double < 1e-14
    assert all(0.3 < distance < 0.51 for distance in bf16)  # rounded to the nearest, once
    assert empty == ((0, 3), [[0.0] * 3] * 2)


def packed_products():
    """{dtype: (relative error with a packed weight, the same after the weight became another)}, inside and outside."""
    from grpo_mega.parallel import onednn, products

    onednn.install()
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        left, weight = torch.randn(5, 576, dtype=dtype), torch.randn(100, 576, dtype=dtype)

        def errors(left=left, weight=weight):
            exact = left.double() @ weight.double().t()
            several = left @ weight.t(), products.rows_by_rows(left, weight), left.clone() @ weight[:60].t()
            return [((x.double() - exact[:, : x.shape[1]]).norm() / exact.norm()).item() for x in several]

        with mock.patch.object(onednn, "_multiplies_bf16", lambda: False):
            with onednn.packed([weight, weight.t().contiguous().t()]):  # the second has no layout that can be packed
                fresh = errors()
                weight.mul_(2)
                stale = errors()
                square = torch.randn(576, 576, dtype=dtype)  # multiplied untransposed, and not among the packed
                other = ((left @ square).double() - left.double() @ square.double()).norm().item()
            found[str(dtype)] = fresh, stale, errors(), other
    return found


def test_packed_weights_are_multiplied_and_forgotten(ranks):
    """Inside, a weight that changes is still its copy (error 1/2); a slice of it, and all afterwards, is what it is."""
    found = ranks(1, packed_products)[0]
    for dtype, rounding in (("torch.float32", 1e-6), ("torch.bfloat16", 4e-3)):
        fresh, stale, after, other = found[dtype]
        assert max(fresh) < rounding and fresh[1] < 1e-6  # rows_by_rows gives float32 of bf16
        assert stale[:2] == pytest.approx([0.5, 0.5], rel=1e-2) and stale[2] < rounding
        assert max(after) < rounding and other < 1e-2 * 576
    fresh, stale, after, other = found["torch.float64"]  # not packed
    assert max(*fresh, *stale, *after) < 1e-14 and other < 1e-9
