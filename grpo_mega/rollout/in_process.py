"""Sampling on the training weights, in the training processes: nothing is copied, nothing can go stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_mega.model.decode import Decoder, RowGroup
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.rollout.noise import uniforms
from grpo_mega.types import Completion, Prompt


@dataclass
class _Row:
    """One completion while it grows."""

    prompt: int  # place in the wave
    noise: Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    near: int = 0
    stopped: bool = False


@dataclass
class _Flight:
    """A row group with its live rows in slot order."""

    group: RowGroup
    rows: list[_Row]


class InProcessSampler:
    """Samples with the policy's own modules under any tensor and pipeline layout.

    Rows are decoded in waves of at most `max_rows`, each cut into as many row groups as there are pipeline stages.
    A finished row leaves its group at once. `decode` turns token ids into text.
    """

    def __init__(
        self,
        make_decoder: Callable[[], Decoder],
        mesh: Mesh,
        *,
        seed: int,
        max_completion_tokens: int,
        stop_token_ids: Sequence[int],
        max_rows: int,
        decode: Callable[[Sequence[int]], str],
    ):
        self.make_decoder, self.mesh, self.seed = make_decoder, mesh, seed
        self.max_tokens, self.stop, self.max_rows = max_completion_tokens, frozenset(stop_token_ids), max_rows
        self.decode = decode

    def sample(self, prompts: Sequence[Prompt], group_size: int, step: int) -> list[list[Completion]]:
        """`group_size` completions a prompt, in order; the same on every rank of this replica."""
        decoder = self.make_decoder()
        wave = max(1, self.max_rows // group_size)
        result = []
        for start in range(0, len(prompts), wave):
            part = prompts[start : start + wave]
            rows = [
                _Row(n, uniforms(self.seed, step, prompt.index, c, self.max_tokens))
                for n, prompt in enumerate(part)
                for c in range(group_size)
            ]
            self._run(decoder, part, rows)
            done = [self._completion(row) for row in rows]
            result += [done[n * group_size : (n + 1) * group_size] for n in range(len(part))]
        decoder.finish()
        return result

    def _run(self, decoder: Decoder, prompts: Sequence[Prompt], rows: list[_Row]) -> None:
        count = min(self.mesh.pipeline.size, len(rows))
        cuts = [rows[len(rows) * g // count : len(rows) * (g + 1) // count] for g in range(count)]
        groups = decoder.start(
            [prompt.token_ids for prompt in prompts],
            [[row.prompt for row in cut] for cut in cuts],
            [torch.stack([row.noise[0] for row in cut]).to(self.mesh.device) for cut in cuts],
            self.max_tokens,
        )
        flights = [_Flight(group, cut) for group, cut in zip(groups, cuts, strict=True)]
        while flights:
            flights = [flight for flight in flights if self._step(decoder, flight)]

    def _step(self, decoder: Decoder, flight: _Flight) -> bool:
        """Take in what was drawn, let finished rows go, feed the others; False when none is left."""
        for row, (token, logprob, near) in zip(flight.rows, decoder.drawn(flight.group).tolist(), strict=True):
            row.token_ids.append(int(token))
            row.logprobs.append(logprob)
            row.near += int(near)
            row.stopped = int(token) in self.stop
        going = [n for n, row in enumerate(flight.rows) if not row.stopped and len(row.token_ids) < self.max_tokens]
        if len(going) < len(flight.rows):
            order = flight.group.cache.keep(going)
            flight.rows = [flight.rows[n] for n in order]
        if not going:
            return False
        device = self.mesh.device
        tokens = torch.tensor([row.token_ids[-1] for row in flight.rows], device=device)
        noise = torch.stack([row.noise[len(row.token_ids)] for row in flight.rows]).to(device)
        decoder.advance(flight.group, tokens, noise)
        return True

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            token_ids=tuple(row.token_ids),
            sampler_logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.stopped else "length",
            text=self.decode(row.token_ids),
            near_boundary=row.near,
        )
