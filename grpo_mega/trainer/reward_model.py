"""Reward models in the loop: each a frozen scorer of its own layout, asked once a step for all completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_mega.config import ParallelConfig, Recipe
from grpo_mega.config.reward_model import RewardModelConfig
from grpo_mega.data.conversations import Reader, Reading, samples_of, separator_token
from grpo_mega.data.tokenizer import check_vocabulary, load_tokenizer
from grpo_mega.errors import DataError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.families import read_scored
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh, another_layout
from grpo_mega.rewards.score import Asked, Outcome
from grpo_mega.trainer.batches import equalize, pair_cost_of
from grpo_mega.trainer.check import judging_layout
from grpo_mega.trainer.heads import ScoreHead
from grpo_mega.trainer.policy import Scorer, Tick, silent
from grpo_mega.trainer.reference import Reference
from grpo_mega.types import Microbatch, Prompt


@dataclass(frozen=True)
class Judge:
    """What is known of a reward model before any rank waits for another: its recipe's words, shape and tokenizer."""

    name: str
    config: RewardModelConfig
    arch: Architecture
    reader: Reader


def read_judges(recipe: Recipe) -> dict[str, Judge]:
    """The recipe's reward models, without their weights. Raises GrpoMegaError."""
    judges = {}
    for name, config in recipe.reward_models.items():
        section, arch = f"reward_models.{name}", read_scored(config.path)
        tokenizer = load_tokenizer(config.path, config.tokenizer, section=section)
        check_vocabulary(tokenizer, config.tokenizer or config.path, arch.vocab_size)
        limit = min(arch.context_length, config.max_tokens or arch.context_length)
        if config.separator is not None:
            try:
                separator_token(tokenizer, config.separator)
            except DataError as error:
                raise DataError(f"{section}: {error}") from None
        reader = Reader(tokenizer, limit, arch.raw.get("pad_token_id"), config.separator)
        judges[name] = Judge(name, config, arch, reader)
    return judges


def check_conversations(judges: Mapping[str, Judge], prompts: Sequence[Prompt]) -> None:
    """Raise DataError, naming the model, for prompts that its tokenizer has no way to put into a conversation."""
    for judge in judges.values():
        # a template is a program that is wrong for all or for few: one rendering finds the former; without one, a
        # prompt of several messages is refused
        for prompt in prompts if judge.reader.tokenizer.chat_template is None else prompts[:1]:
            try:
                judge.reader.tokenizer.conversation_ids(prompt.messages, "x")
            except DataError as error:
                raise DataError(f"reward_models.{judge.name} cannot read {prompt.text[:60]!r}: {error}") from None


def build_reward_models(
    recipe: Recipe, judges: Mapping[str, Judge], mesh: Mesh, beside: ParallelConfig | None = None
) -> dict[str, RewardModel]:
    """Load them beside a policy on `mesh`, whose layout is `beside` (default: training's); every rank must call."""
    return {name: RewardModel(judge, recipe, mesh, beside or recipe.parallel) for name, judge in judges.items()}


class RewardModel:
    """A reward model as whoever trains on `mesh` asks it, whatever mesh it is on itself and wherever its weights wait.

    The value of a completion is the score s at the end of the conversation (one label), or sigma(s), the probability
    of "yes", where the model has two labels, no and yes, and s is their log-odds. With a separator it is a process
    reward model, which gives such a value for each step of the completion.
    """

    def __init__(self, judge: Judge, recipe: Recipe, mesh: Mesh, beside: ParallelConfig):
        """Every rank must call."""
        config, arch = judge.config, judge.arch
        layout = judging_layout(config, beside, arch)
        own = mesh if layout.sizes == beside.sizes else another_layout(mesh, **layout.sizes)
        dtype = DTYPES[config.dtype or recipe.precision.dtype]
        with own.active():
            model = build_model(arch, own, layout, dtype=dtype, trainable=False)
        scorer, self.layers = Scorer(ScoreHead(model, own)), layers_per_stage(arch, layout.stages)
        self._scorer = Reference(scorer, mesh, offload=config.offload, layers=self.layers)
        self.judge, self.layout, self.own, self.capacity = judge, layout, own, recipe.batch.tokens_per_microbatch
        self.folder, self._mesh, self._dtype = Path(config.path), mesh, scorer.dtype

    def load(self, folder: Path) -> None:
        """Become the reward model of another folder, of the same shape. Every rank must call."""
        self._scorer.load(folder, read=read_scored)
        self.folder = folder

    def outcomes(self, asked: Sequence[Asked], tick: Tick = silent) -> list[Outcome]:
        """The values of each of this data rank's completions (of a process reward model: one a step), or why it has
        none: too long for the model, say.

        Every rank must call; all ranks of a replica, and its context ranks, with the same completions, and get the
        same answer.
        """
        read: list[tuple[int, int, Reading] | str] = []
        slot = 0
        for one in asked:
            try:
                reading = self._read(one)
                read.append((slot, one.prompt.index, reading))
                slot += len(reading.places)
            except DataError as error:
                read.append(f"DataError: {error}")
        batches = equalize(
            samples_of([one for one in read if not isinstance(one, str)]),
            1,
            self.capacity,
            self._mesh,
            self._dtype,
            also=self.layout.row_multiple,
            pair_cost=pair_cost_of(self.judge.arch),
        )
        scores = scores_by_slot(batches, self._scorer.logprobs(batches, tick), self._mesh)
        labels, found = self.judge.arch.labels, list[Outcome]()
        for what in read:
            if isinstance(what, str):
                found.append((None, what))
            else:
                first, _, reading = what
                places = range(first, first + len(reading.places))
                found.append((tuple(value_of(scores[place], labels) for place in places), None))
        return found

    def _read(self, asked: Asked) -> Reading:
        reader, messages = self.judge.reader, asked.prompt.messages
        return (
            reader.whole(messages, asked.completion.text)
            if reader.separator is None
            else reader.steps(messages, asked.steps)
        )


def value_of(score: float, labels: int) -> float:
    """What a score is worth as a reward: itself, or of two labels the probability of the second."""
    return score if labels == 1 else float(torch.tensor(score, dtype=torch.float64).sigmoid())


def slots_of(batch: Microbatch) -> tuple[Tensor, list[int]]:
    """The scored rows [n] of a microbatch, and the number of each one's score: see `samples_of`."""
    rows, slots = batch.loss_weights.nonzero().squeeze(1), list[int]()
    seen: Counter[int] = Counter()
    for first in batch.advantages[rows].long().tolist():
        slots.append(first + seen[first])
        seen[first] += 1
    return rows, slots


def scores_by_slot(batches: Sequence[Microbatch], values: Sequence[Tensor | None], mesh: Mesh) -> dict[int, float]:
    """The scores of these microbatches by their numbers.

    values: [T] of each microbatch on the last stages, None elsewhere; the answer is there on every rank that has the
    microbatches. Every rank must call.
    """
    found: dict[int, float] = {}
    for batch, value in zip(batches, values, strict=True):
        if value is not None:
            rows, slots = slots_of(batch)
            found.update(zip(slots, value[rows].tolist(), strict=True))
    return collectives.broadcast_object(found, mesh.pipeline.group, mesh.pipeline.size - 1)
