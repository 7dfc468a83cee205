"""Sampling in the training processes: on the training weights themselves, or on a copy under a layout of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo_mega.model.decode import Decoder, RowGroup
from grpo_mega.parallel import collectives
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
    kept: list[np.ndarray] = field(default_factory=list)  # this rank's part of what each token was drawn from
    near: int = 0
    stopped: bool = False


@dataclass
class _Flight:
    """A row group with its live rows in slot order; group None: of other replicas alone, which this one serves."""

    group: RowGroup | None
    rows: list[_Row]


class InProcessSampler:
    """Samples with the policy's own modules under any tensor and pipeline layout.

    Rows are decoded in waves of at most `max_rows`, each cut into as many row groups as there are pipeline stages; a
    prompt's rows are in one wave unless they alone are more.
    A finished row leaves its group at once. `decode` turns token ids into text. `routes`: the decoder's mesh is not the
    training mesh, so its data ranks share the prompts their own way and every rank gets back what it asked for.
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
        routes: bool = False,
    ):
        self.make_decoder, self.mesh, self.seed = make_decoder, mesh, seed
        self.max_tokens, self.stop, self.max_rows = max_completion_tokens, frozenset(stop_token_ids), max_rows
        self.decode, self.routes = decode, routes

    def sample(
        self, prompts: Sequence[Prompt], mine: Sequence[int], group_size: int, step: int
    ) -> list[list[Completion]]:
        """`group_size` completions of each of prompts[i], i in `mine`; see `Sampler`."""
        if not self.routes:
            return self._sample([prompts[i] for i in mine], group_size, step)
        places = self.mesh.share(len(prompts))
        sampled = dict(zip(places, self._sample([prompts[i] for i in places], group_size, step), strict=True))
        for part in collectives.gather_objects(sampled, self.mesh.data.group):
            sampled |= part
        return [sampled[i] for i in mine]

    def _sample(self, prompts: Sequence[Prompt], group_size: int, step: int) -> list[list[Completion]]:
        decoder = self.make_decoder()
        wave = self.max_rows // group_size * group_size or self.max_rows  # a group larger than a wave is cut
        wanted = [(place, c) for place in range(len(prompts)) for c in range(group_size)]
        rows: list[_Row] = []
        with decoder.session():
            for n in range(decoder.agree(-(-len(wanted) // wave))):
                these = wanted[n * wave : (n + 1) * wave]
                places = list(dict.fromkeys(place for place, _ in these))
                part = [prompts[place] for place in places]
                more = [
                    _Row(places.index(place), uniforms(self.seed, step, prompts[place].index, c, self.max_tokens))
                    for place, c in these
                ]
                self._run(decoder, part, more)
                rows += more
        kept = self._kept(rows) if decoder.truncation is not None else [None] * len(rows)
        done = [self._completion(row, sets) for row, sets in zip(rows, kept, strict=True)]
        return [done[n : n + group_size] for n in range(0, len(done), group_size)]

    def _run(self, decoder: Decoder, prompts: Sequence[Prompt], rows: list[_Row]) -> None:
        count = decoder.agree(min(self.mesh.pipeline.size, len(rows)))
        cuts = [rows[len(rows) * g // count : len(rows) * (g + 1) // count] for g in range(count)]
        groups = decoder.start(
            [prompt.token_ids for prompt in prompts],
            [[row.prompt for row in cut] for cut in cuts],
            [torch.stack([row.noise[0] for row in cut] or [torch.empty(())]).to(self.mesh.device) for cut in cuts],
            self.max_tokens,
        )
        flights = [_Flight(group, cut) for group, cut in zip(groups, cuts, strict=True)]
        while flights:
            flights = [flight for flight in flights if self._step(decoder, flight)]

    def _step(self, decoder: Decoder, flight: _Flight) -> bool:
        """Take in what was drawn, let finished rows go, feed the others; False when none is left on any replica."""
        group = flight.group
        going = self._take(decoder.drawn(group).tolist(), group, flight) if group is not None and flight.rows else []
        if not decoder.agree(len(going)):
            return False
        if group is None or not going:
            decoder.idle()
            return True
        device = self.mesh.device
        tokens = torch.tensor([row.token_ids[-1] for row in flight.rows], device=device)
        noise = torch.stack([row.noise[len(row.token_ids)] for row in flight.rows]).to(device)
        decoder.advance(group, tokens, noise)
        return True

    def _take(self, drawn: list[list[float]], group: RowGroup, flight: _Flight) -> list[_Row]:
        """Give each row what was drawn for it; the rows that go on, in slot order."""
        for n, (row, (token, logprob, near)) in enumerate(zip(flight.rows, drawn, strict=True)):
            row.token_ids.append(int(token))
            row.logprobs.append(logprob)
            row.near += int(near)
            row.stopped = int(token) in self.stop
            if group.kept is not None:
                row.kept.append(group.kept[n])
        going = [n for n, row in enumerate(flight.rows) if not row.stopped and len(row.token_ids) < self.max_tokens]
        if len(going) < len(flight.rows):
            order = group.cache.keep(going)
            flight.rows = [flight.rows[n] for n in order]
        return flight.rows

    def _kept(self, rows: Sequence[_Row]) -> list[tuple[np.ndarray, ...]]:
        """What each token of each row was drawn from, put together from the slices of the last stage's ranks."""
        shares = collectives.gather_objects([row.kept for row in rows], self.mesh.replica.group)
        parts = [share for share in shares if any(share)]  # earlier stages have seen nothing
        return [
            tuple(np.concatenate(slices) for slices in zip(*(part[n] for part in parts), strict=True))
            for n in range(len(rows))
        ]

    def _completion(self, row: _Row, kept: tuple[np.ndarray, ...] | None) -> Completion:
        return Completion(
            token_ids=tuple(row.token_ids),
            sampler_logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.stopped else "length",
            text=self.decode(row.token_ids),
            near_boundary=row.near,
            kept=kept,
        )
