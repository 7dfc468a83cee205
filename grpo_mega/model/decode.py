"""Decoding with the training weights: a KV cache and one step at a time, over tensor and pipeline ranks.

The modules are the very ones that train (so sampler and training log-probs differ by rounding only); in place of packed
segments, attention gets cached rows. A prompt runs once; its keys and values are then copied to each of its rows.

Every rank of a model replica walks through the same row groups in the same order. The last stage draws and tells all
stages; with as many row groups in flight as there are stages, no stage waits for another's turn. (Virtual stages make a
ring of the pipeline, in which one row group at a time goes round: exact, but with a `sampling.pipeline` of its own a
sampler is quicker.)

A mixture's experts may lie on other replicas (`Mesh.in_step`): all of those run equally many forwards, in one order.
What decides about a forward is agreed first, and who has no row for it takes part with one of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from grpo_mega.model.attention import PackedRows
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives, cpu, onednn
from grpo_mega.parallel.draw import draw
from grpo_mega.parallel.head import VocabSlice
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.parallel.pipeline import PipelineLink
from grpo_mega.parallel.truncation import Truncation


@dataclass(frozen=True)
class PromptRows(PackedRows):
    """Packed prompts whose rotated keys and values are kept: `store[layer] = (key, value)`, each [T, kv_heads, d]."""

    store: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        self.store[layer] = (key, value)
        return PackedRows.attend(self, layer, query, key, value, window)

    def prompt(self, place: int) -> slice:
        """The rows of the chunk's prompt number `place`."""
        start = sum(self.lengths[:place])
        return slice(start, start + self.lengths[place])


@dataclass(frozen=True)
class CachedRows:
    """One new token a row, which joins its row's cache and attends to it. Rows beyond the cache's count are padding."""

    cos: Tensor
    sin: Tensor
    cache: KVCache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """query [R, heads, d] -> [R, heads, d]: softmax(q K^T / sqrt(d)) V over the row's own length, or its end."""
        cache, count = self.cache, self.cache.count
        first, hidden = cache.sight(window)
        keys, values = (x[:, :, first:] for x in cache.append(layer, key[:count], value[:count]))
        # [count, kv_heads, L, d]
        heads = query[:count].unflatten(1, (keys.shape[1], -1)) * query.shape[-1] ** -0.5
        scores = (heads @ keys.transpose(2, 3)).masked_fill_(hidden[:, None, None], -torch.inf)
        context = (torch.softmax(scores, dim=-1) @ values).flatten(1, 2)
        return torch.cat((context, query[count:])) if len(query) > count else context


class KVCache:
    """A row group's keys and values on one stage: `[layers, 2, rows, kv_heads, capacity, d]`; rows 0..count-1 live."""

    def __init__(self, chunks: Sequence[PromptRows], prompt_of_row: Sequence[int], capacity: int):
        """Row r starts as prompt `prompt_of_row[r]`, prompts being numbered through the chunks."""
        places = [(chunk, chunk.prompt(place)) for chunk in chunks for place in range(len(chunk.lengths))]
        layers = sorted(chunks[0].store)
        sample = chunks[0].store[layers[0]][0]
        shape = (len(layers), 2, len(prompt_of_row), sample.shape[1], capacity, sample.shape[2])
        # zeros, not empty: a masked position is multiplied by 0, and 0 times a stray nan is nan
        self.data = torch.zeros(shape, dtype=sample.dtype, device=sample.device)
        self.place = {layer: n for n, layer in enumerate(layers)}
        for prompt in sorted(set(prompt_of_row)):
            rows = [r for r, p in enumerate(prompt_of_row) if p == prompt]
            chunk, where = places[prompt]
            for layer in layers:
                for kind, tensor in enumerate(chunk.store[layer]):
                    self.data[self.place[layer], kind, rows, :, : where.stop - where.start] = tensor[where].transpose(
                        0, 1
                    )
        self.lengths = torch.tensor(
            [places[p][1].stop - places[p][1].start for p in prompt_of_row], device=sample.device
        )
        self.count = len(prompt_of_row)
        self.begin_step()

    def begin_step(self) -> None:
        """Fix what this step's layers share: the reach of the longest row and the masks of what a row must not see."""
        live = self.lengths[: self.count]
        self.reach = int(live.max()) + 1
        self.rows = torch.arange(self.count, device=live.device)
        self.positions = torch.arange(self.reach, device=live.device)
        whole = 0, self.positions > live.unsqueeze(1)
        self.sights: dict[int | None, tuple[int, Tensor]] = {None: whole}

    def sight(self, window: int | None) -> tuple[int, Tensor]:
        """What this step's rows see of their caches, in layers with that window: the first position that any of them
        sees, and `[count, reach - first]` bool: of the positions from there on, those that a row does not see."""
        if window is None or window >= self.reach:
            return self.sights[None]
        if window not in self.sights:
            at = self.lengths[: self.count].unsqueeze(1)
            first = max(int(at.min()) - window + 1, 0)
            positions = self.positions[first:]
            self.sights[window] = first, (positions > at) | (positions <= at - window)
        return self.sights[window]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new position into every live row; returns views [count, kv_heads, reach, d] of keys and values."""
        keys, values = self.data[self.place[layer]]
        at = self.lengths[: self.count]
        keys[self.rows, :, at] = key
        values[self.rows, :, at] = value
        return keys[: self.count, :, : self.reach], values[: self.count, :, : self.reach]

    def end_step(self) -> None:
        self.lengths[: self.count] += 1

    def keep(self, slots: list[int]) -> list[int]:
        """Drop every live row that is not in `slots`; returns which old slot each new slot holds.

        A freed slot is refilled from the end, so that a finished row costs one row's copy.
        """
        order = list(range(self.count))
        for slot in sorted(set(order) - set(slots), reverse=True):
            last = order.pop()
            if last != slot:
                order[slot] = last
        targets = [new for new, old in enumerate(order) if new != old]
        if targets:
            sources = [order[new] for new in targets]
            reach = int(self.lengths.max())
            self.data[:, :, targets, :, :reach] = self.data[:, :, sources, :, :reach]
            self.lengths[targets] = self.lengths[sources]
        self.count = len(order)
        return order


@dataclass
class RowGroup:
    """Rows that step together.

    On the last stage, of the last draw: drawn `[n, 3]` float64 (token, log-prob, near boundary); under truncation also
    kept, n arrays of int32: the token ids on this tensor rank's slice that the row was drawn from.
    """

    cache: KVCache
    drawn: Tensor | None = None
    kept: list[np.ndarray] | None = None


class Decoder:
    """Steps row groups through the model of this replica. All of its ranks must make the same calls."""

    def __init__(
        self,
        model: ModelParts,
        vocab_size: int,
        mesh: Mesh,
        temperature: float,
        tick: Callable[[], None] = lambda: None,
        truncation: Truncation | None = None,
    ):
        self.truncation = truncation
        self.model, self.vocab_size, self.mesh, self.temperature = model, vocab_size, mesh, temperature
        self.tick = tick  # called once a forward
        self.link = PipelineLink(mesh)
        self.dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def start(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_of_row: Sequence[Sequence[int]],
        uniforms: Sequence[Tensor],
        max_new_tokens: int,
    ) -> list[RowGroup | None]:
        """Run every prompt once and draw each row's first token.

        prompts: token ids; prompt_of_row[g][r]: the prompt of row r in row group g (None for one without rows);
        uniforms[g] [rows] in [0, 1).
        """
        with cpu.suspended(), self.mesh.active():
            chunks, last_hidden = self._prefill(prompts)
            capacity = max(map(len, prompts), default=0) + max_new_tokens
            groups: list[RowGroup | None] = []
            for rows, noise in zip(prompt_of_row, uniforms, strict=True):
                if not rows:
                    groups.append(None)
                    continue
                group = RowGroup(KVCache(chunks, rows, capacity))
                if last_hidden is not None:
                    self._draw(group, last_hidden[list(rows)], noise)
                groups.append(group)
        return groups

    def drawn(self, group: RowGroup) -> Tensor:
        """What was drawn for the group's live rows, `[n, 3]`, on every rank; waits for the last stage."""
        if not self.mesh.pipeline.last:
            return self.link.hear((group.cache.count, 3), torch.float64)
        assert group.drawn is not None
        return group.drawn

    @torch.no_grad()
    def advance(self, group: RowGroup, tokens: Tensor, uniforms: Tensor) -> None:
        """Feed one token a live row and draw the next one.  tokens [n] int64; uniforms [n] float64."""
        with cpu.suspended(), self.mesh.active():
            cache = group.cache
            cache.begin_step()
            positions = cache.lengths[: cache.count]
            hidden = self.forward(tokens, positions, lambda cos, sin: CachedRows(cos, sin, cache))
            cache.end_step()
            if hidden is not None:
                self._draw(group, hidden[: cache.count], uniforms)

    def agree(self, value: int) -> int:
        """The largest value of the ranks that must step together; its own for a model without experts elsewhere."""
        return collectives.max_int(value, self.mesh.in_step.group, self.mesh.device)

    @torch.no_grad()
    def idle(self) -> None:
        """Take part in the others' step with a row of padding."""
        with cpu.suspended(), self.mesh.active():
            nothing = torch.zeros(1, dtype=torch.int64, device=self.mesh.device)
            self.forward(nothing, nothing, lambda cos, sin: PackedRows(cos, sin, ()))

    @contextmanager
    def session(self) -> Iterator[None]:
        """All calls belong into one: the weights stay as they are in it, and no hand-over is under way at its end."""
        with onednn.packed(self._weights()):
            yield
            self.link.flush()

    def _weights(self) -> Iterator[Tensor]:
        """What a decoding step of this stage multiplies with."""
        for part in self.model:
            for module in part.decoder.modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    yield module.weight
        if self.mesh.pipeline.last:
            weight = self.model.output_weight()
            yield weight[: VocabSlice.of(weight, self.vocab_size, self.mesh.tensor.group).valid]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[PromptRows], Tensor | None]:
        """Packed prompts in about as many chunks as stages; on the last stage also each prompt's last hidden state."""
        size = max(1, -(-len(prompts) // self.mesh.pipeline.size))
        count = -(-len(prompts) // size)
        idle = self.agree(count) - count
        chunks, last = [], []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            lengths = tuple(map(len, part))
            tokens = torch.tensor([t for p in part for t in p], device=self.mesh.device)
            positions = torch.tensor([n for p in part for n in range(len(p))], device=self.mesh.device)
            hidden = self.forward(tokens, positions, lambda cos, sin, lengths=lengths: PromptRows(cos, sin, lengths))
            chunks.append(self._rows)
            if hidden is not None:
                last.append(hidden[[end - 1 for end in accumulate(lengths)]])
        for _ in range(idle):
            self.idle()
        return chunks, torch.cat(last) if last else None

    def forward(self, tokens: Tensor, positions: Tensor, make_rows) -> Tensor | None:
        """This rank's stages on `[n]` tokens: the last one has `[n or more, H]` hidden states, on every rank."""
        pipeline, tensor = self.mesh.pipeline, self.mesh.tensor
        self.tick()
        sharded = tensor.size if self.model.config.sequence_parallel else 1
        padding = -len(tokens) % sharded
        if padding:  # sequence parallelism cuts rows evenly
            tokens, positions = (torch.nn.functional.pad(x, (0, padding)) for x in (tokens, positions))
        self._rows = make_rows(*self.model.rope(positions))
        for part in self.model:
            if not part.pre_process:
                shape = (len(tokens) // sharded, 1, self.model.config.hidden_size)
                part.set_input_tensor(self.link.receive(shape, self.dtype))
            hidden = part(tokens.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=self._rows)
            if not part.post_process:
                self.link.send(hidden)
        if not pipeline.last:
            return None
        return collectives.gather(hidden[:, 0], tensor.group).flatten(0, 1) if sharded > 1 else hidden[:, 0]

    def _draw(self, group: RowGroup, hidden: Tensor, uniforms: Tensor) -> None:
        drawn = draw(
            hidden,
            self.model.output_weight(),
            uniforms,
            vocab_size=self.vocab_size,
            group=self.mesh.tensor.group,
            temperature=self.temperature,
            truncation=self.truncation,
        )
        columns = drawn.tokens, drawn.logprobs, drawn.near_boundary
        group.drawn = torch.stack([column.double() for column in columns], dim=1)
        if drawn.kept is not None:
            row, token = (x.cpu().numpy() for x in drawn.kept)
            ends = np.searchsorted(row, np.arange(1, len(hidden)))
            group.kept = np.split(token.astype(np.int32), ends)
        self.link.publish(group.drawn)
