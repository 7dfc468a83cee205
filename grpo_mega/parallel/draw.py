"""Drawing tokens from a vocabulary that is cut over ranks: an inverse CDF over the ranks' slices.

Truncation (top-k, top-p) keeps the tokens whose logit reaches a threshold, which all ranks agree on; ties at the
threshold stay together, so that the kept set does not depend on the cut of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.parallel import collectives
from grpo_mega.parallel.truncation import Truncation, lowest_kept
from grpo_mega.parallel.vocab import NEAR_BOUNDARY, VocabSlice, local_logits


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

    Cumulative sums run in float64; per row two numbers a rank cross in one all-gather and three in one sum, so that
    another cut of the vocabulary can only change a draw that is near a boundary.
    """
    part = VocabSlice.of(weight, vocab_size, group)
    logits = local_logits(hidden, weight, part, temperature)
    count = logits.shape[0]
    m = logits.amax(dim=1) if part.valid else logits.new_full((count,), -torch.inf)
    p = torch.exp(logits - m.unsqueeze(1))
    keeps = near_threshold = None
    if truncation is not None:
        limit, near_threshold = lowest_kept(logits, truncation, group)
        keeps = logits >= limit.unsqueeze(1)
        p = p * keeps
    cdf = torch.cumsum(p, dim=1, dtype=torch.float64)
    mass = cdf[:, -1] if part.valid else cdf.new_zeros(count)
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
            cdf, p, logits = cdf[mine], p[mine], logits[mine]
        wanted = ((threshold - begin)[mine] / scale[mine]).clamp_(min=0.0).unsqueeze(1)
        place = torch.searchsorted(cdf, wanted, right=True).clamp_(max=part.valid - 1)
        upper = cdf.gather(1, place)
        lower = upper - p.gather(1, place)
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
