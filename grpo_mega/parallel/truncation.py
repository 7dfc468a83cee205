"""Top-k and top-p (nucleus, arXiv:1904.09751) over a vocabulary that is cut over ranks, as one threshold a row.

top-k keeps the k largest logits; top-p then keeps the fewest of the largest whose mass is at least p of what top-k
left. Both mean: keep z_j >= t. Tokens with the very logit t are kept together, so the set is the same however the
vocabulary is cut, and ranks exchange a few numbers a row: their k largest for top-k; sums of mass for top-p, in a
search over the bits of t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.parallel import collectives

FANOUT = 16  # thresholds tried at a time: 8 sums over the ranks find one of 2^32 floats
CANDIDATES = 1024  # largest logits sorted first; the whole slice only where the mass of these does not do
NEAR_BOUNDARY = 1e-5  # a share of mass, or nats, by which rounding could move the threshold past a token


@dataclass(frozen=True)
class Truncation:
    """top_k 0: no limit; top_p 1.0: no limit."""

    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, top_k: int, top_p: float) -> Truncation | None:
        """None where nothing is cut off."""
        return cls(top_k, top_p) if top_k or top_p < 1 else None


def lowest_kept(logits: Tensor, truncation: Truncation, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """([n] the smallest logit that is kept, [n] bool: near a boundary), the same on every rank.

    logits [n, P], this rank's real vocabulary, after the temperature.
    """
    limit = logits.new_full((len(logits),), -torch.inf)
    near = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if truncation.top_k:
        limit, near = _kth_largest(logits, truncation.top_k, group)
    if truncation.top_p < 1:
        limit, near_mass = _nucleus(logits, limit, truncation.top_p, group)
        near |= near_mass
    return limit, near


def _kth_largest(logits: Tensor, k: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    mine = logits.new_full((len(logits), k + 1), -torch.inf)
    count = min(k + 1, logits.shape[1])
    mine[:, :count] = logits.topk(count, dim=1).values
    several = collectives.gather(mine, group).transpose(0, 1).flatten(1)
    largest = several.topk(k + 1, dim=1).values
    return largest[:, k - 1], largest[:, k - 1] - largest[:, k] < NEAR_BOUNDARY


def _nucleus(logits: Tensor, lowest: Tensor, share: float, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The largest t with mass(z >= t) >= share * mass(z >= lowest)."""
    width = logits.shape[1]
    device = logits.device
    largest = logits.amax(dim=1) if width else logits.new_full((len(logits),), -torch.inf)
    top = collectives.gather(largest, group).amax(dim=0)
    mass = torch.exp(logits - top.unsqueeze(1)).double() * (logits >= lowest.unsqueeze(1))
    wanted = share * collectives.sum_(mass.sum(dim=1), group)
    for count in (min(CANDIDATES, width), width):
        values, order = logits.topk(count, dim=1)  # descending
        cumulative = torch.nn.functional.pad(mass.gather(1, order).cumsum(dim=1), (1, 0))
        found, reached, beyond = _search(values, cumulative, wanted, top, group)
        # what a rank did not sort must lie below the threshold
        unsorted = count < width and bool((values[:, -1] >= found).any())
        if not collectives.max_int(int(unsorted), group, device):
            break
    total = wanted / share
    near = torch.minimum(reached - wanted, wanted - beyond) < NEAR_BOUNDARY * total
    return torch.maximum(found, lowest), near


def _search(values, cumulative, wanted, top, group) -> tuple[Tensor, Tensor, Tensor]:
    """([n] t, [n] mass(z >= t), [n] mass(z > t)) by a search over t's ordered bits: exact, whoever holds the logit.

    values [n, c] descending, cumulative [n, c + 1] the mass of the first i of them, wanted [n] float64.
    """
    low, high = _ordered(torch.full_like(top, -torch.inf)), _ordered(top) + 1  # mass(low) >= wanted > mass(high) = 0
    ascending = _ordered(values).flip(1)
    reached = torch.full_like(wanted, torch.inf)
    beyond = torch.zeros_like(wanted)
    steps = torch.arange(1, FANOUT, device=wanted.device)
    while bool((low + 1 < high).any()):
        # low + (high - low) * step / FANOUT, without the difference, which may exceed 63 bits
        whole, rest = high // FANOUT - low // FANOUT, high % FANOUT - low % FANOUT
        tries = low.unsqueeze(1) + whole.unsqueeze(1) * steps + rest.unsqueeze(1) * steps // FANOUT
        above = ascending.shape[1] - torch.searchsorted(ascending, tries)  # how many of ours are >= each
        masses = collectives.sum_(cumulative.gather(1, above), group)
        enough = masses >= wanted.unsqueeze(1)
        number = enough.sum(dim=1)  # masses fall as t rises: the first `number` tries are enough
        edges = torch.cat((low.unsqueeze(1), tries, high.unsqueeze(1)), dim=1)
        known = torch.cat((reached.unsqueeze(1), masses, beyond.unsqueeze(1)), dim=1)
        low, high = (edges.gather(1, (number + i).unsqueeze(1)).squeeze(1) for i in (0, 1))
        reached, beyond = (known.gather(1, (number + i).unsqueeze(1)).squeeze(1) for i in (0, 1))
    return _from_ordered(low, values.dtype), reached, beyond


def _ordered(values: Tensor) -> Tensor:
    """int64 that order like the floats: their bits, the negative ones' turned round."""
    wide = torch.int32 if values.dtype.itemsize == 4 else torch.int64
    bits = values.contiguous().view(wide).long()
    return torch.where(bits >= 0, bits, torch.iinfo(wide).min - bits)


def _from_ordered(order: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.int32 if dtype.itemsize == 4 else torch.int64
    return torch.where(order >= 0, order, torch.iinfo(wide).min - order).to(wide).view(dtype)
