"""Log-probs and entropies from a vocabulary that is cut over ranks: full logits never exist anywhere.

Rank r holds rows `[r * P, (r + 1) * P)` of the output layer, P = padded vocabulary / ranks. Per row of hidden states
each rank reduces its own logits to four numbers

    m = max_j z_j,   s = sum_j exp(z_j - m),   e = sum_j exp(z_j - m) (z_j - m),   z_y (0 where the target is elsewhere)

which travel in one all-gather a chunk and are merged in rank order, so that every rank computes the same bits:

    M = max_r m_r,   S = sum_r s_r exp(m_r - M),   ln p(y) = (z_y - M) - ln S
    H = ln S - (1 / S) sum_r exp(m_r - M) (e_r + s_r (m_r - M))

Logits exist a chunk of rows at a time, on the rank's own slice; the backward computes them again:

    dL/dz_j = g_y (1[j = y] - p_j) - g_H p_j (ln p_j + H)

Logits are divided by the temperature, in the rows' dtype, max(float32, input dtype). Rows of the padded vocabulary
are left out of every sum. `group=None` is the dense reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.parallel import collectives, products
from grpo_mega.types import Kept

CHUNK_ELEMENTS = 1 << 25  # logits held at a time on one rank: 128 MiB in float32
NEAR_BOUNDARY = 1e-5  # a uniform number this close to a boundary of the CDF could have been decided by rounding
EXCLUDED = -1e30  # logit of a token that is not kept: exp gives 0, and unlike -inf it gives 0 times 0, not nan


@dataclass(frozen=True)
class VocabSlice:
    """This rank's part of the vocabulary: the first token id it holds and how many real ones."""

    start: int
    valid: int
    vocab_size: int

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: ProcessGroup | None) -> VocabSlice:
        """weight `[P, H]`: this rank's slice of the output layer."""
        start = collectives.rank(group) * weight.shape[0]
        return cls(start, min(max(vocab_size - start, 0), weight.shape[0]), vocab_size)


def logprobs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    temperature: float = 1.0,
    kept: Kept | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """ln p(targets | hidden) and the entropy of p, in nats; differentiable in `hidden` and `weight`.

    hidden [n, H], replicated over the group; weight [P, H], this rank's slice; targets [n] int64, global token ids.
    kept: the tokens that p is over, all others having probability 0 (see `truncation`); None: the whole vocabulary.
    Returns two `[n]` tensors of dtype max(float32, hidden.dtype), the same on every rank. The gradient of `hidden` is
    summed over the group inside. Raises ValueError on mismatched shapes or a temperature that is not positive.
    """
    if hidden.shape[0] != targets.shape[0] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    part = VocabSlice.of(weight, vocab_size, group)
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // max(1, weight.shape[0]))
    return _LogProbs.apply(hidden, weight, targets, part, group, temperature, kept, rows)


def local_logits(hidden: Tensor, weight: Tensor, part: VocabSlice, temperature: float) -> Tensor:
    """[c, valid] in max(float32, dtype): this rank's logits of one chunk, real vocabulary only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = products.rows_by_rows(hidden, weight[: part.valid]).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _kept_logits(hidden, weight, part: VocabSlice, temperature: float, kept: Kept | None, rows: slice) -> Tensor:
    """`local_logits` of the given rows, those of tokens that are not kept being EXCLUDED."""
    logits = local_logits(hidden[rows], weight, part, temperature)
    if kept is None:
        return logits
    row, token = kept.slice(rows.start, rows.start + logits.shape[0])
    mine = (token >= part.start) & (token < part.start + part.valid)
    excluded = torch.ones_like(logits, dtype=torch.bool)
    excluded[row[mine] - rows.start, token[mine] - part.start] = False
    return logits.masked_fill_(excluded, EXCLUDED)


def _row_statistics(logits: Tensor, targets: Tensor, part: VocabSlice) -> Tensor:
    """[c, 4]: (m, s, e, z_y) of this rank's logits, which are overwritten."""
    if part.valid == 0:
        empty = logits.new_zeros(logits.shape[0], 4)
        empty[:, 0] = torch.finfo(logits.dtype).min / 2  # no mass; not -inf, which times 0 is nan
        return empty
    local = targets - part.start
    mine = (local >= 0) & (local < part.valid)
    z_y = logits.gather(1, local.clamp(0, part.valid - 1).unsqueeze(1)).squeeze(1).masked_fill(~mine, 0.0)
    m = logits.amax(dim=1)
    shifted = logits.sub_(m.unsqueeze(1))
    p = torch.exp(shifted)
    s = p.sum(dim=1)
    e = torch.linalg.vecdot(p, shifted)
    return torch.stack((m, s, e, z_y), dim=1)


def _merge(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, c, 4] -> (ln Z, ln p(y), H), each [c], summed in rank order."""
    m, s, e, z_y = stats.unbind(dim=2)
    top = m.amax(dim=0)
    scale = torch.exp(m - top)
    total, weighted = (s * scale).sum(dim=0), ((e + s * (m - top)) * scale).sum(dim=0)
    log_total = torch.log(total)
    return top + log_total, (z_y.sum(dim=0) - top) - log_total, log_total - weighted / total


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, part, group, temperature, kept, chunk_rows):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_z, logprobs, entropies = (torch.empty(len(targets), dtype=dtype, device=hidden.device) for _ in range(3))
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = _kept_logits(hidden, weight, part, temperature, kept, rows)
            stats = collectives.gather(_row_statistics(logits, targets[rows], part), group)
            log_z[rows], logprobs[rows], entropies[rows] = _merge(stats)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropies)
        ctx.settings = (part, group, temperature, kept, chunk_rows)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, targets, log_z, entropies = ctx.saved_tensors
        part, group, temperature, kept, chunk_rows = ctx.settings
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        live = weight[: part.valid]
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            dlogits = _kept_logits(hidden, weight, part, temperature, kept, rows)
            _logits_gradient(dlogits, targets[rows], log_z[rows], entropies[rows], grad_logprobs[rows],
                             grad_entropies[rows], part)  # fmt: skip
            dlogits = dlogits.div_(temperature)
            grad_hidden[rows] = products.through_rows(dlogits, live)
            grad_weight[: part.valid] += products.through_rows(dlogits.t(), hidden[rows])
        collectives.sum_(grad_hidden, group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *[None] * 6


def _logits_gradient(logits, targets, log_z, entropies, grad_logprobs, grad_entropies, part: VocabSlice) -> None:
    """Overwrite a chunk's logits with dL/dz, z being the logits after the temperature."""
    logp = logits.sub_(log_z.unsqueeze(1))
    p = torch.exp(logp)
    # one coefficient an element: -p (g_y + g_H (ln p + H))
    logp.add_(entropies.unsqueeze(1)).mul_(grad_entropies.unsqueeze(1)).add_(grad_logprobs.unsqueeze(1))
    logp.mul_(p).neg_()
    local = targets - part.start
    mine = ((local >= 0) & (local < part.valid)).nonzero().squeeze(1)
    logp[mine, local[mine]] += grad_logprobs[mine]
