"""Rewards of completions, in training and evaluation alike: of models by all ranks together, of functions once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grpo_mega.config import RewardConfig
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.rewards.resolve import Part
from grpo_mega.rewards.score import asked_about, score_groups
from grpo_mega.rewards.steps import Marks
from grpo_mega.trainer.policy import Tick
from grpo_mega.trainer.reward_model import RewardModel
from grpo_mega.types import Completion, Group, Prompt


@dataclass(frozen=True)
class Scoring:
    """decode: token ids -> text, as completions' texts were made. models: by the names that parts have for them."""

    rule: RewardConfig
    parts: Sequence[Part]
    models: Mapping[str, RewardModel]
    decode: Callable[[Sequence[int]], str]
    mesh: Mesh
    tick: Tick

    def by_leader(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[Group] | None:
        """The groups, on the rank that leads its replica; None elsewhere. Every rank must call."""
        rule, groups = self.rule, None
        marks = None if rule.steps is None else Marks(self.decode, **rule.steps.marks)
        asked = asked_about(prompts, completions, rule.truncated, marks) if self.models else []
        given = {name: model.outcomes(asked, self.tick) for name, model in self.models.items()}
        if self.mesh.leads_replica:
            groups = score_groups(
                prompts,
                completions,
                self.parts,
                truncated=rule.truncated,
                truncation_reward=rule.truncation_reward,
                marks=marks,
                given=given,
            )
        return groups

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[Group]:
        """The groups, told to all ranks that have these prompts. Every rank must call."""
        groups = self.by_leader(prompts, completions)
        groups = collectives.broadcast_object(groups, self.mesh.replica.group)
        return collectives.broadcast_object(groups, self.mesh.context.group)
