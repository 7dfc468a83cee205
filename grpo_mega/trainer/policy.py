"""The policy and the frozen reference: log-probs of microbatches, and one optimizer update.

The loss contract with megatron (`calculate_per_token_loss`): each microbatch returns the sum over its tokens of
loss_weights * token loss, with loss_weights = w_t * R / D, and its rows as the count. Megatron adds both over
microbatches and data-parallel ranks and divides once, by R: what is left is sum_t w_t / D * token loss, whatever the
layout. No other factor of parallelism appears anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from grpo_mega.config import OptimizerConfig
from grpo_mega.errors import GrpoMegaError
from grpo_mega.model.attention import PackedRows, Rows
from grpo_mega.model.context import ContextRows
from grpo_mega.model.experts import Routing
from grpo_mega.model.optimizer import build_optimizer, settle, wrap_for_training
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives
from grpo_mega.parallel.context import in_rows, places_of, summed
from grpo_mega.trainer.heads import Head
from grpo_mega.types import Mean, Metrics, Microbatch, Segments, TokenBatch, add_metrics

# (logprobs [n], entropies [n], the same tokens' weights and advantages) -> (sum of weighted token losses, metrics); the
# trained tokens come in several calls, whose losses and metrics are added up
TokenObjective = Callable[[Tensor, Tensor, TokenBatch], tuple[Tensor, Metrics]]
Tick = Callable[[], None]


def silent() -> None: ...


@dataclass(frozen=True)
class WholeSequences:
    """An objective whose terms depend on whole completions: it is called once a microbatch, with `tokens.segments`."""

    objective: TokenObjective


Objective = TokenObjective | WholeSequences


class Scorer:
    """A model's log-probs of given tokens (or whatever its head reads); without gradients all a reference needs."""

    def __init__(self, head: Head):
        self.head, self.model, self.mesh = head, head.model, head.mesh
        # of log-probs and of what the objective multiplies them with: bf16 would round a loss weight by 0.4 %
        self.dtype = torch.promote_types(head.model.config.params_dtype, torch.float32)
        self._entry: Sequence[nn.Module] = list(head.model)  # what megatron's schedule calls

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Microbatch], tick: Tick = silent) -> list[Tensor | None]:
        """`[T]` log-probs of each microbatch's targets, 0 where not trained; None on all but the last stage.

        Under `sampling.temperature`, like every log-prob of the step: the policy is the tempered distribution. A reward
        model's are its scores.
        """

        def collect(batch: Microbatch, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
            rows = batch.loss_weights.nonzero().squeeze(1)
            values = self.head.values(hidden, batch, rows)
            return torch.zeros_like(batch.loss_weights, dtype=values.dtype).index_copy(0, rows, values)

        found = self._run(batches, collect, tick, forward_only=True)
        if not self.mesh.pipeline.last:
            return [None] * len(batches)
        return [in_rows(values, self.mesh.context) for values in found]

    def _run(self, batches: Sequence[Microbatch], on_hidden: Callable, tick: Tick, *, forward_only: bool) -> list:
        """All microbatches through megatron's schedule (1F1B under pipeline parallelism); a tick for each forward."""

        def forward(iterator: Iterator[Microbatch], model: nn.Module):
            tick()
            batch, rows = self._mine(next(iterator))
            hidden = model(batch.input_ids[None], batch.position_ids[None], None, packed_seq_params=rows)
            return hidden, partial(on_hidden, batch)

        self.model.train(not forward_only)
        mesh, interleaved = self.mesh, self.mesh.virtual > 1
        p2p = P2PCommunicator(mesh.pipeline.group, self.model.config) if mesh.pipeline.size > 1 else None
        schedule = get_forward_backward_func(mesh.pipeline.size, mesh.virtual if interleaved else None)
        return schedule(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in self._entry] if interleaved else iter(batches),
            model=list(self._entry) if interleaved else self._entry[0],
            num_microbatches=len(batches),
            seq_length=batches[0].rows,  # megatron divides by the context ranks, and by the tensor ranks where it must
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            pg_collection=mesh.groups,
            p2p_communicator=p2p,
        )

    def _mine(self, batch: Microbatch) -> tuple[Microbatch, Rows]:
        """The rows of a microbatch that this context rank holds, and who among all of them may see which."""
        context = self.mesh.context
        if context.size > 1:
            batch = batch.part(places_of(batch.rows, context).to(batch.input_ids.device))
        cos, sin = self.model.rope(batch.position_ids)
        routing = self._routing(batch)
        segments = tuple(batch.cu_seqlens.diff().tolist()), batch.prefixes
        if context.size > 1:
            return batch, ContextRows(cos, sin, *segments, context, routing)
        return batch, PackedRows(cos, sin, *segments, routing)

    def _routing(self, batch: Microbatch) -> Routing | None:
        """What a mixture's routers are told of this rank's rows; a reference's choose for themselves."""
        return None


class Policy(Scorer):
    """The model that is trained: gradient buffers, optimizer and schedule around it."""

    def __init__(
        self,
        head: Head,
        settings: OptimizerConfig,
        num_steps: int,
        *,
        overlap: bool = False,
        replays: bool = False,
    ):
        """replays: updates choose a mixture's experts as the last `logprobs` of their microbatches did (Routing Replay,
        arXiv:2507.18071, section 5.3)."""
        super().__init__(head)
        self._replays, self._records, self._row_weight = replays, False, 0.0
        self.buffers = self._entry = wrap_for_training(
            head.model, head.mesh, distributed=settings.distributed, overlap=overlap
        )
        self.optimizer, self.scheduler = build_optimizer(self.buffers, settings, num_steps)

    def settled(self) -> ModelParts:
        """The model, once every weight of the last update has arrived; every rank must call."""
        settle(self.buffers)
        return self.model

    def begin_step(self) -> None:
        """Move the learning rate on."""
        self.scheduler.step(1)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def logprobs(self, batches: Sequence[Microbatch], tick: Tick = silent) -> list[Tensor | None]:
        self._records = self._replays
        try:
            return super().logprobs(batches, tick)
        finally:
            self._records = False

    def _routing(self, batch: Microbatch) -> Routing | None:
        if not self.model.config.num_moe_experts:
            return None
        chosen = batch.routes if self._replays and (self._records or batch.routes) else None
        return Routing(batch.segment_ids >= 0, self._row_weight, chosen, self._records)

    def _weight_of_rows(self, batches: Sequence[Microbatch]) -> float:
        """R / V, all rows of an update over those that are no padding: what auxiliary losses are multiplied with."""
        config = self.model.config
        if not config.num_moe_experts or not (config.moe_aux_loss_coeff or config.moe_z_loss_coeff):
            return 0.0
        mine = sum(batch.rows for batch in batches), sum(int(batch.cu_seqlens[-1]) for batch in batches)
        rows, real = (collectives.sum_int(count, self.mesh.data.group, self.mesh.device) for count in mine)
        return rows / max(1, real)

    def gradients(self, batches: Sequence[Microbatch], objective: Objective, tick: Tick = silent) -> Metrics:
        """Fill the gradient buffers with the gradient of the batches' loss; metrics on the last stage, {} elsewhere.

        The loss of all ranks adds up to Mean(loss, 1): losses of several updates are averaged as one each, however
        many rows they had.
        """
        every_row = batches[0].rows * len(batches) * self.mesh.data.size  # R

        def loss(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor, Metrics]:
            rows = batch.loss_weights.nonzero().squeeze(1)
            tokens = batch.take(rows)
            count = torch.tensor(batch.rows, dtype=torch.int, device=hidden.device)
            metrics: Metrics = {}

            def of_chunk(logprobs: Tensor, entropies: Tensor, where: slice) -> tuple[Tensor, Metrics]:
                assert not isinstance(objective, WholeSequences)
                return objective(logprobs, entropies, tokens.at(where))

            def report(total: Tensor, more: Metrics) -> None:  # in the backward, where there is one sweep
                metrics.update(more, loss=Mean(total.double() / every_row, batch.rows / every_row))

            if isinstance(objective, WholeSequences):
                tokens = replace(tokens, segments=self._segments(batch, rows))
                total, more = objective.objective(*self.head.differentiable(hidden, batch, rows), tokens)
                report(total.detach(), more)
                return total, count, metrics
            return self.head.loss(hidden, batch, rows, of_chunk, report), count, metrics

        self._row_weight = self._weight_of_rows(batches)
        for part in self.buffers:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        return add_metrics(*self._run(batches, loss, tick, forward_only=False))

    def _segments(self, batch: Microbatch, rows: Tensor) -> Segments:
        """The completions of the trained rows [n]; their sums are over all context ranks, each of which must ask."""
        context = self.mesh.context
        return Segments(batch.segment_ids[rows], len(batch.prefixes), lambda sums: summed(sums, context))

    def update(self, batches: Sequence[Microbatch], objective: Objective, tick: Tick = silent) -> Metrics:
        """One optimizer step on the batches. Raises GrpoMegaError, on every rank, before a bad gradient is kept."""
        metrics = self.gradients(batches, objective, tick)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise GrpoMegaError(
                f"the gradient norm is {grad_norm}; the run stops before anything is saved: lower optimizer.lr, "
                "or look for rewards or log-probs out of range in the last rollouts"
            )
        if self.mesh.pipeline.last:
            metrics["grad_norm"] = Mean(grad_norm, 1)
        return metrics
