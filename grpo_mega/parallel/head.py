"""The output layer as a policy: its slice of the vocabulary, tiles of logits, hidden rows in and their gradients out.

What both operators of `vocab` are made of. A tile is the logits of a chunk of rows on this rank's slice; no more than
one exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.errors import GrpoMegaError
from grpo_mega.parallel import collectives, products, row_kernels
from grpo_mega.types import Kept

EXCLUDED = -1e30  # logit of a token that is not kept: exp gives 0, and unlike -inf it gives 0 times 0, not nan
# A chunk reads the weights twice and their gradient once, and writes that: with so many rows these cost a few percent
# of its products (on Hopper chunks of 256 lose a third against 4096). Fewer where a tile would exceed the memory.
ROWS = {"cpu": 384, "cuda": 4096}
TILE_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


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

    def columns(self, tokens: Tensor) -> Tensor:
        """Token ids -> columns of this slice, -1 for those of other ranks."""
        return torch.where((tokens >= self.start) & (tokens < self.start + self.valid), tokens - self.start, -1)


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits softcap * tanh(scale * h W^T / softcap) / temperature, of this rank's slice.

    vocab_size: real tokens; rows of the weight beyond them are left out of every sum. sequence_parallel: hidden states
    come as [T / ranks, H], each rank its rows. temperature: a number, or [n], one a token. softcap None: no tanh.
    chunk_rows: for tests; by default `ROWS` and `TILE_BYTES` decide.
    """

    vocab_size: int
    group: ProcessGroup | None = None
    sequence_parallel: bool = False
    temperature: float | Tensor = 1.0
    scale: float = 1.0
    softcap: float | None = None
    kept: Kept | None = None
    chunk_rows: int | None = None

    def check(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None) -> None:
        """Raise ValueError for what the caller did wrong, before any collective."""
        count = len(targets) if rows is None else len(rows)
        total = hidden.shape[0] * (collectives.size(self.group) if self.sequence_parallel else 1)
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != (count,):
            raise ValueError(f"{shapes}: they must be [T, H], [P, H] and [rows]")
        if rows is None and total != count:
            raise ValueError(f"{shapes}: {total} rows of hidden states, {count} targets")
        if hidden.dtype != weight.dtype or not hidden.is_floating_point() or targets.dtype != torch.int64:
            dtypes = f"hidden is {hidden.dtype}, weight {weight.dtype}, targets {targets.dtype}"
            raise ValueError(f"{dtypes}: targets must be int64, the others of one floating-point dtype")
        if isinstance(self.temperature, Tensor):
            if self.temperature.shape != (count,):
                raise ValueError(f"temperature {tuple(self.temperature.shape)} for {count} targets")
            low = float(self.temperature.min()) if count else 1.0
        else:
            low = self.temperature
        if not low > 0:
            raise ValueError(f"temperature={low} must be positive")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive, or None")

    def check_values(self, hidden: Tensor, targets: Tensor) -> None:
        """Raise GrpoMegaError for a target that is no token and for hidden states [n, H] that are not finite."""
        wrong, broken = (targets < 0) | (targets >= self.vocab_size), ~hidden.isfinite().all(dim=1)
        if not bool((wrong.any() | broken.any()).item()):  # one look at the device
            return
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise GrpoMegaError(
                f"target {int(targets[row])} of trained token {row} is outside the vocabulary of {self.vocab_size}; "
                "use the tokenizer that the model was made with"
            )
        raise GrpoMegaError(
            f"the hidden states of {int(broken.sum())} of {len(hidden)} trained tokens are nan or infinite (first: "
            f"{int(broken.nonzero()[0])}); the weights have diverged: go on from an older checkpoint with a lower "
            "optimizer.lr"
        )

    def scale_(self, z: Tensor, rows: slice = slice(None)) -> Tensor:
        """h W^T -> logits, in place."""
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            z.mul_(self.scale)
        if isinstance(self.temperature, Tensor):
            return z.div_(self.temperature[rows, None])
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    # ---- rows in, gradients out

    def rows_of(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """[n, H]: the rows that enter the head, the same on every rank."""
        if self.sequence_parallel:
            hidden = collectives.gather(hidden, self.group).flatten(0, 1)
        return hidden if rows is None else hidden[rows]

    def hidden_gradient(self, grad: Tensor, rows: Tensor | None, hidden: Tensor) -> Tensor:
        """This rank's share [n, H] of the rows' gradient -> the gradient of `hidden`, summed before it is rounded."""
        if not self.sequence_parallel:
            collectives.sum_(grad, self.group)
            if rows is None:
                return grad.to(hidden.dtype)
            return torch.zeros_like(hidden).index_copy_(0, rows, grad.to(hidden.dtype))
        if rows is not None:
            total = hidden.shape[0] * collectives.size(self.group)
            grad = grad.new_zeros(total, grad.shape[1]).index_copy_(0, rows, grad)
        return collectives.reduce_scatter(grad, self.group).to(hidden.dtype)


@dataclass(frozen=True)
class Tiles:
    """The tiles of n rows, in memory that is allocated once: at least one, which is empty when n is 0."""

    head: Head
    hidden: Tensor  # [n, H]
    weight: Tensor  # [P, H]
    targets: Tensor  # [n]
    part: VocabSlice
    dtype: torch.dtype
    size: int
    memory: Tensor

    @classmethod
    def of(cls, head: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tiles:
        part = VocabSlice.of(weight, head.vocab_size, head.group)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        size = min(head.chunk_rows or _rows(weight, dtype), max(1, len(targets)))
        memory = torch.empty(size, part.valid, dtype=dtype, device=hidden.device)
        return cls(head, hidden, weight, targets, part, dtype, size, memory)

    def __iter__(self) -> Iterator[slice]:
        count = len(self.targets)
        return (slice(start, min(start + self.size, count)) for start in range(0, max(1, count), self.size))

    def logits(self, rows: slice) -> Tensor:
        """[c, valid]: the logits of these rows, in the tile's memory."""
        head, z = self.head, self.memory[: rows.stop - rows.start]
        products.rows_by_rows(self.hidden[rows], self.weight[: self.part.valid], out=z)
        head.scale_(z, rows)
        if head.kept is not None:
            row, token = head.kept.slice(rows.start, rows.stop)
            column = self.part.columns(token)
            excluded = torch.ones_like(z, dtype=torch.bool)
            excluded[row[column >= 0] - rows.start, column[column >= 0]] = False
            z.masked_fill_(excluded, EXCLUDED)
        return z

    def statistics(self, rows: slice, z: Tensor) -> Tensor:
        """[c, 4]: see `row_kernels`."""
        return row_kernels.statistics(z, self.part.columns(self.targets[rows]))

    def gradient(
        self, rows: slice, z: Tensor, log_z: Tensor, entropies: Tensor, g_y: Tensor, g_h: Tensor | None
    ) -> Tensor:
        """dL / d(h W^T) in the tile's memory, z being its logits. g_y, g_h: dL / d(log-probs, entropies), [c] each."""
        head = self.head
        temperature = head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature
        narrow = self.weight.dtype if z.is_cuda else self.dtype
        outer = head.scale / temperature  # dL/dz is linear in g_y and g_h: cheaper there than on the tile
        column = self.part.columns(self.targets[rows])
        g_y, g_h = g_y * outer, None if g_h is None else g_h * outer
        if head.softcap is None:
            return row_kernels.gradient(z, column, log_z, entropies, g_y, g_h, narrow)
        slope = 1 - (z * (temperature[:, None] if isinstance(temperature, Tensor) else temperature) / head.softcap) ** 2
        return row_kernels.gradient(z, column, log_z, entropies, g_y, g_h, self.dtype).mul_(slope)


def merge(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, c, 4] -> (ln Z, ln p(y), H), each [c], summed in rank order: the same bits on every rank.

    M = max_r m_r,  S = sum_r s_r exp(m_r - M),  ln p(y) = (z_y - M) - ln S,
    H = ln S - (1 / S) sum_r exp(m_r - M) (e_r + s_r (m_r - M)).
    """
    m, s, e, z_y = stats.unbind(dim=2)
    top = m.amax(dim=0)
    scale = torch.exp(m - top)
    total, weighted = (s * scale).sum(dim=0), ((e + s * (m - top)) * scale).sum(dim=0)
    log_total = torch.log(total)
    return top + log_total, (z_y.sum(dim=0) - top) - log_total, log_total - weighted / total


def _rows(weight: Tensor, dtype: torch.dtype) -> int:
    kind = weight.device.type
    return max(1, min(ROWS[kind], TILE_BYTES[kind] // max(1, weight.shape[0] * dtype.itemsize)))
