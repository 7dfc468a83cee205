"""The row kernels in torch and in Triton (under its interpreter where there is no GPU): one body, the same numbers."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.parallel import row_kernels
from grpo_mega.parallel.head import EXCLUDED

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {FP32: 2e-6, FP64: 1e-13}


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """A module with `statistics` and `gradient`, made to take several blocks of rows or columns."""
    if request.param == "torch":
        monkeypatch.setattr(row_kernels, "BLOCK_ELEMENTS", 100)
        return row_kernels
    from grpo_mega.parallel import row_kernels_triton

    monkeypatch.setattr(row_kernels_triton, "BLOCK", 16)
    return row_kernels_triton


@pytest.fixture
def device(kernels):
    return "cpu" if kernels is row_kernels else DEVICE


def tile(rows, columns, dtype, device):
    """Logits of several sizes, some of them excluded; targets, -1 in every third row."""
    generator = torch.Generator().manual_seed(rows * columns)
    z = torch.randn(rows, columns, generator=generator, dtype=FP64) * torch.logspace(-2, 2, rows, dtype=FP64)[:, None]
    column = torch.randint(max(columns, 1), (rows,), generator=generator)
    column[::3] = -1
    excluded = torch.rand(rows, columns, generator=generator) < 0.2
    excluded[torch.arange(rows), column.clamp(min=0)] = False
    return z.masked_fill(excluded, EXCLUDED).to(dtype).to(device), column.to(device)


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("columns", [1, 15, 16, 53])
def test_statistics(kernels, device, dtype, columns):
    z, column = tile(9, columns, dtype, device)
    m, s, e, z_y = kernels.statistics(z, column).double().unbind(1)
    exact = z.double()
    top = exact.amax(dim=1)
    p = torch.exp(exact - top[:, None])
    assert torch.equal(m, top)
    weighted = (p * (exact - top[:, None])).sum(dim=1)
    for found, wanted in ((s, p.sum(dim=1)), (e, weighted)):
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * columns)
    wanted = [exact[r, c].item() if c >= 0 else 0.0 for r, c in enumerate(column.tolist())]
    assert z_y.tolist() == wanted


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("columns", [1, 15, 16, 53])
def test_gradient(kernels, device, dtype, columns, entropy):
    z, column = tile(9, columns, dtype, device)
    exact = z.double()
    log_z = torch.logsumexp(exact, dim=1)
    logp = exact - log_z[:, None]
    entropies = -(logp.exp() * logp).sum(dim=1)
    generator = torch.Generator().manual_seed(1)
    g_y, g_h = torch.randn(2, 9, generator=generator, dtype=FP64).to(device)
    hit = torch.arange(columns, device=device) == column[:, None]
    wanted = g_y[:, None] * (hit.double() - logp.exp())
    if entropy:
        wanted -= g_h[:, None] * logp.exp() * (logp + entropies[:, None])
    found = kernels.gradient(
        z, column, log_z.to(dtype), entropies.to(dtype), g_y.to(dtype), g_h.to(dtype) if entropy else None, dtype
    )
    assert found.data_ptr() == z.data_ptr()  # in the tile's memory
    # float32 logits of 100 are known to 4e-6, and so is ln p
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)  # the torch path multiplies what it has
def test_a_narrow_gradient_overwrites_nothing_that_is_still_to_be_read(kernels, device):
    """bf16 in the front half of each row's float32 memory: what tensor cores multiply."""
    z, column = tile(9, 53, FP32, device)
    log_z, entropies, g_y = torch.logsumexp(z, dim=1), torch.zeros(9, device=device), torch.ones(9, device=device)
    wide = kernels.gradient(z.clone(), column, log_z, entropies, g_y, None, FP32)
    narrow = kernels.gradient(z, column, log_z, entropies, g_y, None, BF16)
    assert narrow.dtype == BF16 and narrow.shape == wide.shape and narrow.data_ptr() == z.data_ptr()
    # a GPU rounds to the nearest (2^-9), the interpreter cuts the last bits off
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=1e-30)


def test_a_slice_without_tokens_has_no_mass(kernels, device):
    z = torch.empty(3, 0, device=device)
    column = torch.full((3,), -1, device=device)
    m, s, e, z_y = kernels.statistics(z, column).unbind(1)
    assert (m < -1e37).all() and m.isfinite().all() and not torch.stack((s, e, z_y)).any()
    ones = torch.ones(3, device=device)
    assert kernels.gradient(z, column, ones, ones, ones, None, FP32).shape == (3, 0)
    assert kernels.statistics(z.new_empty(0, 5), column[:0]).shape == (0, 4)
