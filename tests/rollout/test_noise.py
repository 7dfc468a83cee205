"""The sampling noise is Philox4x64-10 of (seed, step; position, completion, prompt), and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

from grpo_mega.rollout.noise import uniforms

WORD = (1 << 64) - 1
PINNED = (
    [0.011546754286331562, 0.24154919656271812, 0.11142585551493822],
    [0.39374635096595334, 0.3096726844773042, 0.41480762839371543],
    [0.21933884907296886, 0.31190949620881636, 0.14611379043809958],
)


def philox(key, counter):
    """Four 64-bit words of Philox4x64-10 as Salmon et al. (SC 2011) define it."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & WORD, (p0 >> 64) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    "place", [(0, 0, 0, 0), (1, 0, 0, 0), (7, 3, -2, 5), (2**63, 12, 10**9, 63), (0, -1, -(2**40), 1)]
)
def test_every_number_is_philox_of_its_place(place):
    seed, step, prompt, completion = (number & WORD for number in place)
    blocks = [philox((seed, step), (n, completion, prompt, 0)) for n in range(1, 4)]  # the counter is raised first
    wanted = [(word >> 11) / 2**53 for block in blocks for word in block]
    found = uniforms(*place, count=12)
    assert found.dtype == torch.float64 and found.tolist() == wanted


def test_pinned():
    """What these were when the first run was recorded: a change here makes every recorded run another run."""
    assert uniforms(0, 0, 0, 0, 3).tolist() == PINNED[0]
    assert uniforms(1234, 5, 6, 7, 3).tolist() == PINNED[1]
    assert uniforms(1234, 5, -6, 7, 3).tolist() == PINNED[2]


def test_a_shorter_draw_is_the_beginning_of_a_longer_one():
    long = uniforms(3, 1, 4, 1, 50)
    assert all(torch.equal(uniforms(3, 1, 4, 1, count), long[:count]) for count in range(1, 50, 7))


def test_the_order_of_calls_and_other_generators_do_not_matter():
    places = list(itertools.product((0, 1), (0, 1), (-1, 0, 1), (0, 1)))
    first = {place: uniforms(*place, 4) for place in places}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = {place: uniforms(*place, 4) for place in reversed(places)}
    assert all(torch.equal(first[place], again[place]) for place in places)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_place_has_its_own_noise():
    """Negative prompt indices (held-out problems) included; no two of 3 x 3 x 8 x 4 rows share a number."""
    rows = [uniforms(*place, 8) for place in itertools.product(range(3), range(3), range(-4, 4), range(4))]
    assert len(torch.cat(rows).unique()) == len(rows) * 8


def test_uniform():
    """Mean 1/2 and variance 1/12 of 80,000 numbers, within four standard errors."""
    values = torch.cat([uniforms(0, 0, prompt, completion, 100) for prompt in range(100) for completion in range(8)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 1 / 2) < 4 * (1 / 12 / 80000) ** 0.5
    assert abs(values.var() - 1 / 12) < 4 * (1 / 180 / 80000) ** 0.5
