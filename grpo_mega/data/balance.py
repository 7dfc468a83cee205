"""Who gets which work: the cost of packed rows, and an equal share of it for every rank and every microbatch.

A row costs the same wherever it stands, but for attention, where it costs as much as it sees. One pair of a query and a
key is `pair_cost` rows, a number that the model's shape says (`pair_cost_of` in trainer/batches), so that

    work = rows + pair_cost * pairs         [rows]

    pairs = L (L + 1) / 2                   a segment of L rows
            L p + L (L + 1) / 2             a segment that goes on from p rows, all of which it sees

Padding is no work here: it sees nothing, and every rank has the same rows of it and of samples together.
All answers depend on the arguments alone, ties go to the lower index, so ranks that ask alike are answered alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from grpo_mega.data.packing import Bundle, bundle_rows
from grpo_mega.types import Microbatch

PIECE = 1 / 2  # of a microbatch's mean work: bundles heavier than that are cut, so that the bins can be filled evenly
PROMPT = 1 / 32  # of a piece's work: a prompt that costs more than that is not read once more for the sake of balance


def bundle_work(bundle: Bundle, pair_cost: float) -> float:
    """Work of a bundle in rows: its prompt's but the last row once, and of each completion what it sees."""
    shared = bundle[0].prompt_tokens - 1
    pairs = _pairs(shared) + sum(_pairs(len(sample) - 1 - shared, shared) for sample in bundle)
    return bundle_rows(bundle) + pair_cost * pairs


def microbatch_work(batch: Microbatch, pair_cost: float) -> float:
    """Work of a microbatch in rows, padding left out: the sum over its bundles."""
    starts = batch.cu_seqlens.tolist()
    rows = [end - start for start, end in pairwise(starts)]
    pairs = sum(_pairs(n, rows[p] if p >= 0 else 0) for n, p in zip(rows, batch.prefixes, strict=True))
    return sum(rows) + pair_cost * pairs


def _pairs(rows: int, prefix: int = 0) -> int:
    return rows * prefix + rows * (rows + 1) // 2


def first_fit(rows: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` rows, as first-fit-decreasing fills them: the indices into `rows` of each, ascending.

    A unit longer than capacity gets a bin of its own, which then exceeds the capacity: nothing is ever cut.
    """
    parts: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i], i)):
        for b, load in enumerate(loads):
            if load + rows[i] <= capacity:
                loads[b] += rows[i]
                parts[b].append(i)
                break
        else:
            loads.append(rows[i])
            parts.append([i])
    return [sorted(part) for part in parts]


def partition(work: Sequence[float], bins: int) -> list[list[int]]:
    """Units into exactly `bins` bins of nearly equal work: the heaviest next, always into the least loaded bin.

    Returns the indices into `work` of each bin, ascending; a bin may be empty. The largest load is at most the mean
    plus the heaviest unit.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins cannot hold {len(work)} units; use at least 1")
    parts = _heaviest_first(work, bins, [0] * len(work), 0)
    assert parts is not None, "units of no rows fit everywhere"
    return parts


def fill(work: Sequence[float], bins: int, rows: Sequence[int], capacity: int) -> list[list[int]]:
    """`partition` where a bin holds at most `capacity` rows, or one unit that is longer than that, alone.

    Where the heaviest-first rule leaves a unit without room, the bins are first_fit's. Raises ValueError for fewer bins
    than those.
    """
    parts = _heaviest_first(work, bins, rows, capacity)
    if parts is None:
        parts = first_fit(rows, capacity)
        if len(parts) > bins:
            raise ValueError(f"{sum(rows)} rows in {len(rows)} units need {len(parts)} bins of {capacity}, not {bins}")
        parts += [[] for _ in range(bins - len(parts))]
    return parts


def _heaviest_first(work: Sequence[float], bins: int, rows: Sequence[int], capacity: int) -> list[list[int]] | None:
    """Each unit, heaviest first, into the least loaded bin with room for its rows; None once no bin has any."""
    parts: list[list[int]] = [[] for _ in range(bins)]
    loads, used = [0.0] * bins, [0] * bins
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        room = [b for b in range(bins) if used[b] + rows[i] <= capacity or not used[b]]
        if not room:
            return None
        b = min(room, key=lambda b: (loads[b], b))
        parts[b].append(i)
        loads[b] += work[i]
        used[b] += rows[i]
    return [sorted(part) for part in parts]


def distribute(bundles: Sequence[Bundle], bins: int, capacity: int, pair_cost: float) -> list[list[Bundle]]:
    """The bundles of each of `bins` microbatches: nearly equal work, at most `capacity` rows (or a single sample).

    A group of long completions is a heavy bundle, which is cut into pieces of half a microbatch's mean work where the
    prompt, which each piece reads again, is cheap beside that, and where the rows still fit into the bins.
    Raises ValueError for fewer bins than first_fit needs.
    """
    if bins == 1:
        return [list(bundles)]
    limit = PIECE * sum(bundle_work(bundle, pair_cost) for bundle in bundles) / bins
    pieces = [piece for bundle in bundles for piece in _cut(bundle, limit, pair_cost)]
    units = pieces if len(first_fit(list(map(bundle_rows, pieces)), capacity)) <= bins else bundles
    work = [bundle_work(unit, pair_cost) for unit in units]
    return [[units[i] for i in part] for part in fill(work, bins, list(map(bundle_rows, units)), capacity)]


def _cut(bundle: Bundle, limit: float, pair_cost: float) -> list[Bundle]:
    """Runs of the bundle's samples of at most `limit` work (or a single sample)."""
    shared = bundle[0].prompt_tokens - 1
    if shared + pair_cost * _pairs(shared) > PROMPT * limit:
        return [bundle]
    pieces: list[Bundle] = []
    for sample in bundle:
        if pieces and bundle_work([*pieces[-1], sample], pair_cost) <= limit:
            pieces[-1].append(sample)
        else:
            pieces.append([sample])
    return pieces


def imbalance(work: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """How much longer a step takes than with equal work everywhere: by ranks, and by (rank, microbatch); 1.0 is ideal.

    work[rank][minibatch][microbatch], as many on every rank. Minibatches wait for each other, so that of each it is the
    most loaded rank's work that counts, or its number of microbatches times the most loaded one:

        sum_m max_r w[r, m] / sum_m mean_r w[r, m]      sum_m n_m max_rj w[r, m, j] / sum_m n_m mean_rj w[r, m, j]

    nan where there is no work at all.
    """
    minibatches = list(zip(*work, strict=True))
    mean = sum(sum(map(sum, several)) for several in minibatches) / len(work)
    if not mean:
        return math.nan, math.nan
    by_rank = sum(max(map(sum, several)) for several in minibatches)
    by_microbatch = sum(len(several[0]) * max(max(rank) for rank in several) for several in minibatches)
    return by_rank / mean, by_microbatch / mean
