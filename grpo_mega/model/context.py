"""Attention where the rows of packed sequences are divided over context-parallel ranks.

Each rank computes the queries of its rows; keys and values of all rows come by one all-gather a layer, and their
gradients go back by one reduce-scatter (as Llama 3 was trained, arXiv:2407.21783, section 3.3.2: with grouped queries
there is little to gather, and any packing is exact).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from grpo_mega.model.attention import BLOCK, ends_at_own_row
from grpo_mega.parallel.context import in_rows
from grpo_mega.parallel.mesh import Axis


@dataclass(frozen=True)
class ContextRows:
    """`PackedRows` of which this rank holds the rows `places_of` says; lengths and prefixes are the whole's."""

    cos: Tensor  # of this rank's rows, [T / size, 1, kinds * head_dim]
    sin: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    axis: Axis
    routing: Any = None  # see PackedRows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """query [T / size, heads, d], key and value [T / size, kv_heads, d] -> [T / size, heads, d]."""
        both, size = in_rows(torch.cat((key, value), dim=1), self.axis), self.axis.size
        keys, values = both.split(key.shape[1], dim=1)
        half, done = len(query) // 2, []
        for run, mine in zip((self.axis.rank, 2 * size - 1 - self.axis.rank), query.split(half), strict=True):
            begin = run * half
            for queries, shared, own in self._pieces(begin, begin + half, window):
                q = mine[queries.start - begin : queries.stop - begin]
                k, v = (x[own] if shared is None else torch.cat((x[shared], x[own])) for x in (keys, values))
                done.append(ends_at_own_row(q, k, v, window))
            used = min(max(sum(self.lengths) - begin, 0), half)
            done.append(mine[used:] * 0)
        # a rank whose rows are all padding still owes its part of the gradients' sum
        return torch.cat(done) + both.sum() * 0

    def _pieces(self, begin: int, end: int, window: int | None) -> Iterator[tuple[slice, slice | None, slice]]:
        """Within rows begin..end: runs of one segment's queries, the prefix that they see, their segment up to them;
        of both only what the first query's window reaches."""
        ends = list(accumulate(self.lengths))
        segments = [slice(stop - length, stop) for stop, length in zip(ends, self.lengths, strict=True)]
        for number, segment in enumerate(segments):
            prefix = self.prefixes[number] if self.prefixes else -1
            low, high = max(begin, segment.start), min(end, segment.stop)
            for start in range(low, high, BLOCK):
                stop, own = min(start + BLOCK, high), segment.start
                shared = segments[prefix] if prefix >= 0 else None
                if window is not None:
                    own = max(start - window + 1, segment.start)
                    if shared is not None:
                        unreached = max(shared.stop - max(window - 1 - (start - segment.start), 0), shared.start)
                        shared = slice(unreached, shared.stop) if unreached < shared.stop else None
                yield slice(start, stop), shared, slice(own, stop)
