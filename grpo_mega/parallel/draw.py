"""Drawing tokens from a vocabulary that is cut over ranks: an inverse CDF over the ranks' slices.

Truncation (top-k, top-p) keeps the tokens whose logit reaches a threshold, which all ranks agree on; ties at the
threshold stay together, so that the kept set does not depend on the cut of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.parallel import collectives, products
from grpo_mega.parallel.head import Head, VocabSlice
from grpo_mega.parallel.truncation import Truncation, lowest_kept

NEAR_BOUNDARY = 1e-5  # a uniform number this close to a boundary of the CDF could have been decided by rounding
BLOCK = 128  # of the vocabulary, whose mass is summed before cumulative sums are formed


@dataclass(frozen=True)
class Drawn:
    """One token a row, [n] each, the same on every rank; and this rank's part of what was kept.

    tokens int64; logprobs in nats, in the rows' dtype; near_boundary bool: rounding could have decided otherwise.
    kept: None without truncation, else (row, token id), [K] int64 each, rows ascending: this rank's kept tokens.
    """

    tokens: Tensor
    logprobs: Tensor
    near_boundary: Tensor
    kept: tuple[Tensor, Tensor] | None = None


def _block_ends(p: Tensor) -> Tensor:
    """[n, blocks] float64: the mass up to the end of each block of p [n, P], at least one block."""
    whole = p.shape[1] // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(dim=2, dtype=torch.float64)
    rest = p[:, whole:].sum(dim=1, keepdim=True, dtype=torch.float64)
    return torch.cat((sums, rest), dim=1).cumsum_(dim=1)


def _locate(p: Tensor, blocks: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first place of p [n, P] up to whose end there is more mass than wanted [n, 1], and the mass before and after.

    blocks: p's `_block_ends`. All three [n, 1].
    """
    block = torch.searchsorted(blocks, wanted, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, columns.clamp(max=p.shape[1] - 1)).double().masked_fill_(columns >= p.shape[1], 0.0)
    ends = inside.cumsum(dim=1).add_(before)
    at = torch.searchsorted(ends, wanted, right=True).clamp_(max=BLOCK - 1)
    upper = ends.gather(1, at)
    return (block * BLOCK + at).clamp_(max=p.shape[1] - 1), upper - inside.gather(1, at), upper


@torch.no_grad()
def draw(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
) -> Drawn:
    """One token a row by the inverse CDF of softmax(hidden @ weight.T / temperature), token ids in ascending order.

    hidden [n, H], replicated; weight [P, H], this rank's slice; uniforms [n] float64 in [0, 1). With `truncation` the
    distribution is that of the kept tokens alone, and so are the log-probs.

    Sums run in float64, over blocks of the vocabulary first and then within the one block that matters. Per row two
    numbers a rank cross in one all-gather and three in one sum; another cut of the vocabulary can only change a draw
    that is near a boundary.
    """
    part = VocabSlice.of(weight, vocab_size, group)
    logits = products.rows_by_rows(hidden, weight[: part.valid])
    Head(vocab_size, temperature=temperature).scale_(logits)
    count = logits.shape[0]
    m = logits.amax(dim=1) if part.valid else logits.new_full((count,), -torch.inf)
    p = (logits - m.unsqueeze(1)).exp_()
    keeps = near_threshold = None
    if truncation is not None:
        limit, near_threshold = lowest_kept(logits, truncation, group)
        keeps = logits >= limit.unsqueeze(1)
        p *= keeps
    blocks = _block_ends(p)
    mass = blocks[:, -1]
    stats = collectives.gather(torch.stack((m.double(), mass), dim=1), group)  # [ranks, n, 2]
    top = stats[..., 0].amax(dim=0)
    masses = stats[..., 1] * torch.exp(stats[..., 0] - top)
    ends = torch.cumsum(masses, dim=0)
    total = ends[-1]
    threshold = uniforms * total
    me = collectives.rank(group)
    # the owner: the first rank whose end of mass lies above the threshold
    owner = (ends <= threshold).sum(dim=0).clamp_(max=len(ends) - 1)
    begin = ends[me] - masses[me]
    scale = torch.exp(m.double() - top)
    found = torch.zeros(count, 3, dtype=torch.float64, device=logits.device)  # token, logit, near
    mine = (owner == me).nonzero().squeeze(1)
    if mine.numel():
        if mine.numel() < count:  # rows of the whole vocabulary are not copied for nothing
            blocks, p, logits = blocks[mine], p[mine], logits[mine]
        wanted = ((threshold - begin)[mine] / scale[mine]).clamp_(min=0.0).unsqueeze(1)
        place, lower, upper = _locate(p, blocks, wanted)
        width = (NEAR_BOUNDARY * total[mine] / scale[mine]).unsqueeze(1)
        near = (wanted - lower < width) | (upper - wanted < width)
        logit = logits.gather(1, place).double()
        found[mine] = torch.cat((place + part.start, logit, near), dim=1).double()
    collectives.sum_(found, group)
    logprobs, near = (found[:, 1] - (top + torch.log(total))).to(logits.dtype), found[:, 2] > 0
    if keeps is None or near_threshold is None:
        return Drawn(found[:, 0].long(), logprobs, near)
    row, place = keeps.nonzero(as_tuple=True)
    return Drawn(found[:, 0].long(), logprobs, near | near_threshold, (row, place + part.start))
