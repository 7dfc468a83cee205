"""One case on this rank: what it computes, and how far that is from what one process computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.data.advantages import with_advantages
from grpo_mega.model import bridge
from grpo_mega.model.optimizer import gather_gradients
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.selftest.cases import Case
from grpo_mega.selftest.material import STEPS, inputs_of, prompts, recipe_of, scored
from grpo_mega.trainer.batches import minibatches, pair_cost_of, training_share
from grpo_mega.trainer.loop import logprobs_of
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import Run, build_run
from grpo_mega.types import Completion, FinishReason, Metrics, Microbatch, add_metrics

Parts = list[tuple[str, int, int, Tensor]]  # Hugging Face name, dim, first index of that tensor, values
Drawn = tuple[tuple[int, ...], FinishReason, int]  # a completion's token ids, finish reason, draws near a boundary


@dataclass
class Answer:
    """What a case computes, as far as this rank knows it; one process knows everything."""

    drawn: list[list[list[Drawn]]] = field(default_factory=list)  # of each step, each prompt's completions
    logprobs: dict[str, list[Tensor]] = field(default_factory=dict)  # "old", "ref": of each step, by token number
    losses: list[float] = field(default_factory=list)  # of each update
    gradients: Parts = field(default_factory=list)  # of the first update
    parameters: Parts = field(default_factory=list)  # after the last


def answer(case: Case, folder: Path, dtype: str, mesh: Mesh, given: Answer | None) -> Answer:
    """Compute the case. `given`: completions to train on, by which a draw that rounding turned spoils nothing else.

    Every rank of the mesh must call, inside `mesh.active()`. In fp64, which megatron's optimizer refuses, the weights
    stay as they are.
    """
    recipe = recipe_of(case, folder, dtype)
    run = build_run(recipe, inputs_of(recipe), mesh, Progress(None))
    found, pair_cost = Answer(logprobs={"old": [], "ref": []}), pair_cost_of(run.inputs.arch)
    for step in range(STEPS[dtype]):
        found.drawn.append(_sample(run, step))
        source = found if given is None else given
        drawn = [[_completion(one) for one in several] for several in source.drawn[step]]
        groups = with_advantages(scored(step, drawn), recipe.grpo)
        mine = training_share(groups, recipe, mesh, pair_cost)
        parts = minibatches([groups[i] for i in mine], mine, recipe, mesh, run.policy.dtype, pair_cost)
        parts = [logprobs_of(run, batches, on_policy=False) for batches in parts]
        _keep_logprobs(found, [batch for batches in parts for batch in batches])
        run.policy.begin_step()
        for _ in range(case.iterations):
            for batches in parts:
                metrics = run.policy.gradients(batches, run.objective.now())
                if not found.gradients:
                    found.gradients = _gradients(run)
                if dtype != "fp64":
                    metrics = run.policy.update(batches, run.objective.now())
                found.losses.append(_loss(run, metrics))
    found.parameters = _pieces(run, {name: p.detach() for name, p in run.policy.settled().named_parameters()})
    return found


def _sample(run: Run, step: int) -> list[list[Drawn]]:
    asked, mesh = prompts(step), run.mesh
    mine = mesh.share(len(asked))
    completions = run.sampler.sample(asked, mine, run.recipe.grpo.group_size, step)
    by_place = {
        place: [(one.token_ids, one.finish_reason, one.near_boundary) for one in several]
        for place, several in zip(mine, completions, strict=True)
    }
    for part in collectives.gather_objects(by_place, mesh.data.group):
        by_place |= part
    return [by_place[place] for place in range(len(asked))]


def _completion(drawn: Drawn) -> Completion:
    token_ids, reason, near = drawn
    return Completion(token_ids, (0.0,) * len(token_ids), reason, near_boundary=near)


def _keep_logprobs(found: Answer, batches: Sequence[Microbatch]) -> None:
    """By the number that each trained token carries; nan where another rank has it."""
    count = sum(len(one[0]) for several in found.drawn[-1] for one in several) * 2  # room for other completions too
    for kind, values in (("old", [b.old_logprobs for b in batches]), ("ref", [b.ref_logprobs for b in batches])):
        table = torch.full((max(count, 4096),), torch.nan, dtype=torch.float64)
        for batch, logprobs in zip(batches, values, strict=True):
            trained = batch.loss_weights != 0
            if logprobs is not None:
                table[batch.sampler_logprobs[trained].long().cpu()] = logprobs[trained].double().cpu()
        found.logprobs[kind].append(table)


def _loss(run: Run, metrics: Metrics) -> float:
    """The update's loss over all ranks."""
    mine = {"loss": metrics["loss"]} if run.mesh.tensor.first and "loss" in metrics else {}
    return add_metrics(*collectives.gather_objects(mine, run.mesh.world.group))["loss"].value()


def _gradients(run: Run) -> Parts:
    gather_gradients(run.policy.buffers)
    return _pieces(run, {name: vars(p)["main_grad"] for name, p in run.policy.model.named_parameters()})


def _pieces(run: Run, values: dict[str, Tensor]) -> Parts:
    """This rank's part of each Hugging Face tensor."""
    place = bridge.Place.of(run.mesh, run.inputs.layers)
    return [
        (piece.name, piece.dim, piece.source, values[name].narrow(piece.dim, piece.start, piece.length).clone().cpu())
        for name, parts in bridge.pieces(run.inputs.arch, place)
        for piece in parts
        if piece.length
    ]


Squares = dict[tuple[str, int], float]  # tensor, first index of a slice -> squared error of the slice over squared norm


@dataclass
class Difference:
    """How far a rank's answer is from the one process'; adds over ranks by `worst_of`."""

    logprob: float = 0.0  # of the largest, policy's and reference's before the first update
    loss: float = 0.0  # of the largest of the updates'
    gradients: Squares = field(default_factory=dict)
    parameters: Squares = field(default_factory=dict)
    same: int = 0  # completions
    drawn: int = 0
    near: int = 0  # draws near a boundary


def difference(mine: Answer, one: Answer) -> Difference:
    """mine: of any rank; one: of the one process."""
    result = Difference()
    for kind, (found, *_) in mine.logprobs.items():  # before any update: later ones are the gradients' and parameters'
        wanted, known = one.logprobs[kind][0], ~found.isnan()
        if known.any():
            off = (found[known] - wanted[known]).abs().max().item()  # nan: a token that was not to be trained
            off /= wanted[~wanted.isnan()].abs().max().item()
            result.logprob = max(result.logprob, off if off == off else torch.inf)
    largest = max(map(abs, one.losses))  # advantages add up to nothing, and losses nearly so
    for found_loss, wanted_loss in zip(mine.losses, one.losses, strict=True):
        off = abs(found_loss - wanted_loss) / largest
        result.loss = max(result.loss, off if off == off else torch.inf)
    result.gradients = _errors(mine.gradients, one.gradients)
    result.parameters = _errors(mine.parameters, one.parameters)
    for step, expected in zip(mine.drawn, one.drawn, strict=True):
        for several, same in zip(step, expected, strict=True):
            for (ids, _, near), (other, _, _) in zip(several, same, strict=True):
                result.same += ids == other
                result.drawn += 1
                result.near += near
    return result


def _errors(mine: Parts, one: Parts) -> Squares:
    """Of each slice: its squared error, over the squared norm of the whole tensor."""
    whole: dict[str, list[tuple[int, int, Tensor]]] = {}
    for name, dim, source, values in one:
        whole.setdefault(name, []).append((dim, source, values.double()))
    norms = {name: sum(v.square().sum().item() for _, _, v in parts) for name, parts in whole.items()}
    result: Squares = {}
    for name, dim, source, values in mine:
        total = 0.0
        for _, start, wanted in whole[name]:
            low, high = max(source, start), min(source + values.shape[dim], start + wanted.shape[dim])
            if low < high:
                found = values.narrow(dim, low - source, high - low).double()
                total += (found - wanted.narrow(dim, low - start, high - low)).square().sum().item()
        result[name, source] = total / max(norms[name], 1e-60) if total == total else torch.inf
    return result


def worst_of(several: Sequence[Difference], order: Sequence[str]) -> dict[str, Any]:
    """The largest differences of any rank, as a row; `order`: tensors in model order.

    A tensor's error is |found - wanted| / |wanted| in Frobenius norm, of each slice the worst of its copies.
    """
    row: dict[str, Any] = {
        "logprob": max(d.logprob for d in several),
        "loss": max(d.loss for d in several),
        "same": min(d.same for d in several),
        "drawn": max(d.drawn for d in several),
        "near": max(d.near for d in several),
    }
    for kind in ("gradients", "parameters"):
        slices: Squares = {}
        for one in several:
            for key, square in getattr(one, kind).items():
                slices[key] = max(slices.get(key, 0.0), square)
        sums = dict.fromkeys(order, 0.0)
        for (name, _), square in slices.items():
            sums[name] += square
        row[kind] = {name: math.sqrt(square) for name, square in sums.items()}
    return row
