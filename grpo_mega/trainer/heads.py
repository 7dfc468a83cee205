"""What hidden states are read for: log-probs of tokens, or scores. Policies and reward models differ here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives, vocab
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.types import Metrics, Microbatch

Report = Callable[[Tensor, Metrics], None]


class Head(Protocol):
    """A model on its mesh, and what its last stage makes of hidden states [T or T / tp, 1, H] of a microbatch's rows.

    rows [n] int64: those with a loss weight, of which values and loss are.
    """

    model: ModelParts
    mesh: Mesh

    def values(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> Tensor:
        """[n] in max(float32, dtype of the weights), the same on every tensor rank. Needs no gradient."""
        ...

    def loss(
        self, hidden: Tensor, batch: Microbatch, rows: Tensor, objective: vocab.TokenObjective, report: Report
    ) -> Tensor:
        """A scalar whose backward is that of `objective`'s sum over the rows; `report` gets the sum and its metrics.

        Upstream gradients of it have reached every rank's hidden states and weights as they must: see `vocab`.
        """
        ...

    def differentiable(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(values, entropies), [n] each, for objectives of whole sequences, differentiated in the usual way."""
        ...


class TokenHead:
    """ln p(target) of each row under the model's distribution at `temperature`: policies and references."""

    def __init__(self, model: ModelParts, vocab_size: int, mesh: Mesh, temperature: float):
        self.model, self.mesh = model, mesh
        self.vocab_size, self.temperature = vocab_size, temperature

    def values(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> Tensor:
        values, _ = vocab.logprobs_and_entropies(**self.operands(hidden, batch, rows))
        return values

    def loss(
        self, hidden: Tensor, batch: Microbatch, rows: Tensor, objective: vocab.TokenObjective, report: Report
    ) -> Tensor:
        return vocab.one_sweep_loss(**self.operands(hidden, batch, rows), objective=objective, report=report)

    def differentiable(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        return vocab.logprobs_and_entropies(**self.operands(hidden, batch, rows))

    def operands(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> dict[str, Any]:
        """What the vocab-parallel operators are given."""
        return {
            "hidden": hidden[:, 0],
            "weight": self.model.output_weight(),
            "targets": batch.targets[rows],
            "rows": rows,
            "vocab_size": self.vocab_size,
            "group": self.mesh.tensor.group,
            "sequence_parallel": self.model.config.sequence_parallel,
            "temperature": self.temperature,
            "kept": batch.kept,
        }


class ScoreHead:
    """The score s of each row: of one label what the head gives, of two (no, yes) the log-odds z_yes - z_no.

    s is a number in logits, not yet a reward: `trainer/reward_model` has what becomes of it.
    """

    def __init__(self, model: ModelParts, mesh: Mesh):
        self.model, self.mesh = model, mesh

    def values(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> Tensor:
        scores = self._scores(hidden)
        if self.model.config.sequence_parallel:
            scores = collectives.gather(scores, self.mesh.tensor.group).flatten()
        return scores[rows]

    def loss(
        self, hidden: Tensor, batch: Microbatch, rows: Tensor, objective: vocab.TokenObjective, report: Report
    ) -> Tensor:
        """Under sequence parallelism each tensor rank's scalar is of the rows that it holds, and so is its report."""
        scores, here = self._scores(hidden), slice(0, len(rows))
        if self.model.config.sequence_parallel:
            first = self.mesh.tensor.rank * len(scores)
            ends = torch.tensor([first, first + len(scores)], device=rows.device)
            low, high = torch.searchsorted(rows, ends).tolist()
            rows, here = rows[low:high] - first, slice(low, high)
        scores = scores[rows]
        total, metrics = objective(scores, torch.zeros_like(scores), here)
        report(total.detach(), metrics)
        return total

    def differentiable(self, hidden: Tensor, batch: Microbatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError("losses that join scores are differentiated in two passes: see trainer/reward_training")

    def _scores(self, hidden: Tensor) -> Tensor:
        """[rows of this rank]"""
        labels = self.model.scores(hidden[:, 0])
        return labels[:, 0] if labels.shape[1] == 1 else labels[:, 1] - labels[:, 0]
