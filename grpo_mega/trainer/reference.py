"""The frozen reference: on training's mesh, or on the same ranks cut another way, between its uses in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.config import Recipe
from grpo_mega.model import bridge
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.model.offload import HostWeights
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh, another_layout
from grpo_mega.trainer.heads import TokenHead
from grpo_mega.trainer.policy import Scorer, Tick, silent
from grpo_mega.types import Kept, Microbatch


def build_reference(recipe: Recipe, mesh: Mesh, tick: bridge.Tick = bridge.silent) -> Reference:
    """The recipe's first reference beside a policy on `mesh`; every rank must call."""
    layout = recipe.reference.layout or recipe.parallel
    arch = read_architecture(recipe.reference_path)
    stages = layers_per_stage(arch, layout.stages, layout.pipeline_layout)
    own = mesh if layout.sizes == recipe.parallel.sizes else another_layout(mesh, **layout.sizes)
    dtype = DTYPES[recipe.precision.reference or recipe.precision.dtype]
    with own.active():
        model = build_model(arch, own, layout, dtype=dtype, trainable=False, tick=tick)
    scorer = Scorer(TokenHead(model, arch.vocab_size, own, recipe.sampling.temperature))
    return Reference(scorer, mesh, offload=recipe.reference.offload, layers=stages)


class Reference:
    """A frozen scorer for those who train on `mesh`, whatever mesh it is on itself.

    Where the meshes differ, so do the microbatches that a rank has. They are numbered over all of training's data ranks
    (index * data ranks + data rank), and data rank j of the reference scores every number that is j modulo their count.
    """

    def __init__(self, scorer: Scorer, mesh: Mesh, *, offload: bool = False, layers: tuple[int, ...] = ()):
        """layers: of each stage of the scorer's pipeline; needed by `load` alone."""
        self._scorer, self._mesh, self._layers = scorer, mesh, layers
        self._weights = HostWeights(scorer.model) if offload else None

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Microbatch], tick: Tick = silent) -> list[Tensor | None]:
        """As `Scorer.logprobs`, of this rank's microbatches: None on all but training's last stage.

        All must have equally many rows, and all of training's data ranks equally many of them.
        """
        with nullcontext() if self._weights is None else self._weights.on_device():
            if self._scorer.mesh is self._mesh:
                return self._scorer.logprobs(batches, tick)
            return self._routed(batches, tick)

    def load(
        self,
        folder: Path,
        tick: bridge.Tick = bridge.silent,
        read: Callable[[str], Architecture] = read_architecture,
    ) -> None:
        """Become the model of a Hugging Face folder, one of the same shape, whose config.json is `read`. Every rank
        must call."""
        scorer, arch = self._scorer, read(str(folder))
        with nullcontext() if self._weights is None else self._weights.rewritten(), scorer.mesh.active():
            bridge.load(scorer.model, arch, bridge.Place.of(scorer.mesh, self._layers), tick)

    def _routed(self, batches: Sequence[Microbatch], tick: Tick) -> list[Tensor | None]:
        mesh, data = self._scorer.mesh, self._scorer.mesh.data
        total = len(batches) * self._mesh.data.size
        mine = range(data.rank, total, data.size)
        # a pipeline's and, with experts, a world's collectives want as many on every rank: the last one fills up
        numbers = [*mine, *[total - 1] * (-(-total // data.size) - len(mine))]
        arrived = self._fetch(batches, set(numbers))
        with mesh.active():
            values = self._scorer.logprobs([arrived[number] for number in numbers], tick)
        speaks = mesh.pipeline.last and mesh.tensor.first and mesh.context.first
        return self._return(batches, dict(zip(mine, values, strict=False)) if speaks else {})

    def _fetch(self, batches: Sequence[Microbatch], numbers: set[int]) -> dict[int, Microbatch]:
        """The microbatches of these numbers, from whichever of training's data ranks have them."""
        axis, first = self._mesh.data, batches[0]
        flat = [_flat(batch) for batch in batches]
        length = collectives.max_int(max(map(len, flat)), axis.group, first.input_ids.device)
        arrived = {}
        for index, mine in enumerate(flat):  # one at a time: a whole step's of all ranks may not fit
            everyone = collectives.gather(torch.nn.functional.pad(mine, (0, length - len(mine))), axis.group)
            for number in range(index * axis.size, (index + 1) * axis.size):
                if number in numbers:
                    arrived[number] = _from_flat(everyone[number % axis.size], first.rows, first.loss_weights.dtype)
        return arrived

    def _return(self, batches: Sequence[Microbatch], values: dict[int, Tensor | None]) -> list[Tensor | None]:
        """Log-probs by number, each on one rank of the world -> those of this rank's own microbatches."""
        axis, own = self._mesh.data, list[Tensor | None]()
        for index, batch in enumerate(batches):
            everyone = torch.zeros(axis.size, batch.rows, dtype=self._scorer.dtype, device=batch.input_ids.device)
            for rank in range(axis.size):
                value = values.get(index * axis.size + rank)
                if value is not None:
                    everyone[rank] = value
            # a sum of one number and zeros, exact; the world's, since the ranks that have a microbatch in training and
            # those that have it in the reference share no smaller group
            own.append(collectives.sum_(everyone, self._mesh.world.group)[axis.rank].clone())
        return own if self._mesh.pipeline.last else [None] * len(own)


def _flat(batch: Microbatch) -> Tensor:
    """All of a microbatch that its log-probs depend on, as int64."""
    kept = batch.kept or Kept(*batch.input_ids.new_empty(2, 0))
    device = batch.input_ids.device
    return torch.cat(
        (
            torch.tensor([len(batch.prefixes), -1 if batch.kept is None else len(kept.rows)], device=device),
            *(batch.input_ids, batch.targets, batch.position_ids, batch.segment_ids),
            (batch.loss_weights != 0).long(),
            batch.cu_seqlens.long(),
            torch.tensor(batch.prefixes, dtype=torch.int64, device=device),
            *(kept.rows, kept.tokens),
        )
    )


def _from_flat(flat: Tensor, rows: int, dtype: torch.dtype) -> Microbatch:
    """The microbatch of `_flat`; loss weights are 1 where trained, and what no log-prob depends on is 0."""
    segments, pairs = flat[:2].tolist()
    sizes = [2, *[rows] * 5, segments + 1, segments, *[max(pairs, 0)] * 2]
    _, ids, targets, positions, segment_ids, trained, starts, prefixes, *kept = flat[: sum(sizes)].split(sizes)
    nothing = torch.zeros_like(trained, dtype=dtype)
    return Microbatch(
        input_ids=ids,
        targets=targets,
        position_ids=positions,
        segment_ids=segment_ids,
        loss_weights=trained.to(dtype),
        advantages=nothing,
        sampler_logprobs=nothing,
        cu_seqlens=starts.int(),
        prefixes=tuple(prefixes.tolist()),
        kept=None if pairs < 0 else Kept(*kept),
    )
