from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from grpo_mega.data.balance import bundle_work, distribute, fill, first_fit, imbalance, microbatch_work, partition
from grpo_mega.data.packing import bundle_rows, bundles, pack
from grpo_mega.types import Sample


def sample(prompt, completion, group=0):
    """A sample of so many tokens of each."""
    return Sample(
        order=0,
        group=group,
        prompt_tokens=prompt,
        token_ids=tuple(range(prompt)) + (7,) * completion,
        loss_mask=(False,) * prompt + (True,) * completion,
        sampler_logprobs=(0.0,) * (prompt + completion),
        advantage=1.0,
        weight=1.0,
    )


# ---- what a bundle costs


@pytest.mark.parametrize(
    ("bundle", "rows", "pairs"),
    [
        ([sample(2, 2)], 3, 6),  # 3 rows see 1, 2, 3
        ([sample(2, 2), sample(2, 1)], 4, 8),  # the prompt's 1 row sees 1; 2 rows see 2, 3; 1 row sees 2
        ([sample(4, 2), sample(4, 3)], 8, 6 + (2 * 3 + 3) + (3 * 3 + 6)),
        ([sample(1, 2), sample(1, 2)], 4, 3 + 3),  # nothing to share
    ],
)
def test_rows_and_pairs_by_hand(bundle, rows, pairs):
    assert bundle_work(bundle, 0.0) == bundle_rows(bundle) == rows
    assert bundle_work(bundle, 0.25) == rows + 0.25 * pairs


def test_a_microbatch_costs_what_its_bundles_do_and_what_its_rows_see():
    units = [[sample(3, 2), sample(3, 1)], [sample(1, 5)], [sample(2, 2, 1), sample(2, 2, 1), sample(2, 4, 1)]]
    batch = pack(units, 30, scale=1.0, dtype=torch.float32, device="cpu")
    seen = 0
    for row, segment in enumerate(batch.segment_ids.tolist()):
        prefix = batch.prefixes[segment] if segment >= 0 else -1
        seen += sum(
            other >= 0 and ((other == segment and column <= row) or other == prefix)
            for column, other in enumerate(batch.segment_ids.tolist())
        )
    assert batch.cu_seqlens[-1] < batch.rows == 30  # padding is no work
    assert microbatch_work(batch, 1.0) == int(batch.cu_seqlens[-1]) + seen
    for cost in (0.0, 0.25, 1.0):
        assert microbatch_work(batch, cost) == sum(bundle_work(unit, cost) for unit in units)
    assert microbatch_work(pack([], 4, scale=1.0, dtype=torch.float32, device="cpu"), 1.0) == 0.0


# ---- bins


@pytest.mark.parametrize(
    ("rows", "capacity", "bins"),
    [
        ([], 10, []),
        ([4, 8, 1, 4, 2, 1], 10, [[1, 4], [0, 2, 3, 5]]),  # 8+2, 4+4+1+1
        ([6, 6, 6], 10, [[0], [1], [2]]),
        ([25, 1], 10, [[0], [1]]),  # 25 alone, and nothing joins it
        ([10, 10], 10, [[0], [1]]),
    ],
)
def test_first_fit_by_hand(rows, capacity, bins):
    assert first_fit(rows, capacity) == bins


def test_first_fit_lies_between_the_volume_bound_and_one_bin_a_unit():
    rng = random.Random(0)
    for _ in range(200):
        rows = [rng.randint(1, 40) for _ in range(rng.randint(0, 30))]
        capacity = rng.randint(10, 60)
        bins = len(first_fit(rows, capacity))
        assert -(-sum(min(n, capacity) for n in rows) // capacity) <= bins <= len(rows)
        assert bins == len(first_fit(rows[::-1], capacity))
        # no two bins of first-fit are both at most half full
        assert bins <= 1 + 2 * sum(rows) / capacity


@pytest.mark.parametrize(
    ("work", "bins", "expected"),
    [
        ([5, 5, 4, 3, 3], 2, [[0, 2], [1, 3, 4]]),  # 5 | 5, 4 to the first, 3 to the second, 3 to the second: 9 | 11
        ([2, 9, 2, 2], 2, [[1], [0, 2, 3]]),
        ([1, 1], 3, [[0], [1], []]),
        ([0.5, 0.5, 1.0], 2, [[2], [0, 1]]),
        ([], 2, [[], []]),
    ],
)
def test_partition_by_hand(work, bins, expected):
    assert partition(work, bins) == expected


def test_partition_places_every_index_once_and_balances():
    rng = random.Random(1)
    for _ in range(200):
        work = [rng.lognormvariate(3, 1) for _ in range(rng.randint(0, 30))]
        bins = rng.randint(1, 8)
        parts = partition(work, bins)
        assert parts == partition(tuple(work), bins)
        assert len(parts) == bins and all(part == sorted(part) for part in parts)
        assert sorted(i for part in parts for i in part) == list(range(len(work)))
        loads = [sum(work[i] for i in part) for part in parts]
        assert max(loads) <= sum(work) / bins + max(work, default=0) + 1e-9
        assert all(parts) or len(work) < bins
    with pytest.raises(ValueError, match="0 bins cannot hold 1 units; use at least 1"):
        partition([3], 0)


@pytest.mark.parametrize(
    ("work", "bins", "rows", "capacity", "expected"),
    [
        ([9, 8, 3, 2], 2, [4, 4, 4, 4], 8, [[0, 3], [1, 2]]),  # 11 | 11
        ([9, 2, 2, 2], 2, [4, 4, 4, 4], 8, [[0, 3], [1, 2]]),  # 9 2 | 2 2, which would take the third, but is full
        ([5, 5, 4, 3, 3], 2, [5, 5, 4, 3, 3], 10, [[0, 1], [2, 3, 4]]),  # 5 4 | 5 3, no room for 3: first-fit's
        ([5, 5, 4, 3, 3], 3, [5, 5, 4, 3, 3], 10, [[0, 4], [1], [2, 3]]),
        ([30, 1], 2, [12, 1], 10, [[0], [1]]),  # longer than the capacity: alone
        ([1, 30], 3, [12, 1], 10, [[1], [0], []]),
    ],
)
def test_fill_by_hand(work, bins, rows, capacity, expected):
    assert fill(work, bins, rows, capacity) == expected


def test_fill_never_exceeds_the_capacity_and_misses_no_unit():
    rng, stuck = random.Random(2), 0
    for _ in range(400):
        rows = [rng.randint(1, 40) for _ in range(rng.randint(0, 30))]
        work = [n + n * n * rng.random() for n in rows]
        capacity = rng.randint(20, 60)
        least = first_fit(rows, capacity)
        bins = max(1, len(least)) + rng.randint(0, 2)
        parts = fill(work, bins, rows, capacity)
        assert len(parts) == bins and sorted(i for part in parts for i in part) == list(range(len(rows)))
        assert all(sum(rows[i] for i in part) <= capacity or len(part) == 1 for part in parts)
        stuck += parts == least + [[]] * (bins - len(least))
    assert 0 < stuck < 200  # the rule that comes second is met, and is not the first
    with pytest.raises(ValueError, match="18 rows in 3 units need 3 bins of 10, not 2"):
        fill([1.0, 1.0, 1.0], 2, [6, 6, 6], 10)


def test_units_of_equal_rows_are_shared_by_what_they_see():
    """Two sequences of 100 rows and two bundles of four of 25: equal by rows, and not in work."""
    units = [unit for _ in range(2) for unit in ([sample(1, 100)], [sample(1, 25)] * 4)]
    rows, work = [bundle_rows(unit) for unit in units], [bundle_work(unit, 0.02) for unit in units]
    assert rows == [100] * 4 and work == [201.0, 126.0] * 2  # 5050 and 1300 pairs
    by_rows, by_work = fill(rows, 2, rows, 200), fill(work, 2, rows, 200)
    loads = [[sum(work[i] for i in part) for part in parts] for parts in (by_rows, by_work)]
    assert loads == [[402.0, 252.0], [327.0, 327.0]]


@pytest.mark.parametrize(
    ("prompt", "bins", "capacity", "expected"),  # completions of each bundle of each bin
    [
        (1, 1, 100, [[[9, 9, 9, 9], [6]]]),  # one bin: nothing to balance
        (1, 2, 100, [[[9], [9], [6]], [[9], [9]]]),  # 42 rows: pieces of at most 10.5
        (2, 2, 100, [[[9, 9, 9, 9]], [[6]]]),  # the prompt is 1 row, more than a 32nd of a piece
        (1, 2, 36, [[[9], [9], [6]], [[9], [9]]]),
        (1, 3, 24, [[[9], [9]], [[9], [6]], [[9]]]),
    ],
)
def test_heavy_bundles_are_cut_where_it_pays(prompt, bins, capacity, expected):
    units = [[sample(prompt, 9)] * 4, [sample(prompt, 6, 1)]]
    found = distribute(units, bins, capacity, 0.0)
    assert [[[len(s) - prompt for s in bundle] for bundle in bin] for bin in found] == expected


def test_a_cut_that_leaves_no_room_is_not_made():
    units = [[sample(2, 30)] * 4, [sample(2, 30, 1)] * 4]  # 121 rows each; of pieces of at most 60.5 rows, 4 x 31
    assert distribute(units, 2, 123, 0.0) == [[units[0]], [units[1]]]
    assert [[len(unit) for unit in bin] for bin in distribute(units, 2, 124, 0.0)] == [[1] * 4, [1] * 4]


def test_what_is_distributed_is_whole_and_within_the_capacity():
    rng = random.Random(3)
    for _ in range(100):
        prompt, capacity = rng.randint(1, 4), rng.randint(60, 200)
        samples = [replace(sample(prompt, rng.randint(1, 80), i // 4), order=i) for i in range(4 * rng.randint(0, 12))]
        units = bundles(samples, capacity)
        bins = max(1, len(first_fit([bundle_rows(unit) for unit in units], capacity))) + rng.randint(0, 1)
        found = distribute(units, bins, capacity, 0.05)
        assert found == distribute(units, bins, capacity, 0.05)
        assert sorted(s.order for bin in found for unit in bin for s in unit) == list(range(len(samples)))
        assert len(found) == bins
        for bin in found:
            assert sum(map(bundle_rows, bin)) <= capacity or [len(unit) for unit in bin] == [1]


# ---- the imbalance as a number


def test_imbalance_by_hand():
    first, second = [[6.0, 2.0], [5.0]], [[4.0, 0.0], [3.0]]  # of two ranks: two minibatches of 2 and 1 microbatches
    by_rank, by_microbatch = imbalance([first, second])
    # minibatch 0: 8 and 4; minibatch 1: 5 and 3. 20 rows over 2 ranks
    assert by_rank == pytest.approx((8 + 5) / 10)
    assert by_microbatch == pytest.approx((2 * 6 + 5) / 10)
    assert imbalance([[[3.0, 3.0]], [[3.0, 3.0]]]) == (1.0, 1.0)
    assert imbalance([first, first, second, second]) == (by_rank, by_microbatch)  # tensor ranks of a replica
    assert all(map(math.isnan, imbalance([[[0.0]], [[0.0]]])))  # nothing to train on
