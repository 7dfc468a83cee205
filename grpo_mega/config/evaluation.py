"""The recipe's `evaluation` section: what is measured on held-out problems, in training and by `grpo-mega eval`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from grpo_mega.config.base import Name, Positive, Section, nearest
from grpo_mega.config.reward import OPTIONS, PartConfig, RewardConfig

Ks = Annotated[tuple[Positive, ...], Field(strict=False)]


class EvaluationConfig(Section):
    completions: Positive = 4  # of each held-out problem
    # pass@k: at least one of k completions is correct; default: 1, where the reward says which are
    pass_at: Ks | None = None
    maj_at: Ks = ()  # maj@k: most of k completions that have an answer have the right one
    # the part of the reward whose value of 1 makes a completion correct; default: the first that compares with the
    # answer, or the only one that could tell
    correct: Name | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None  # default: training's; 0: always the likeliest token
    max_completion_tokens: Positive | None = None  # default: training's

    @model_validator(mode="after")
    def _ks(self) -> EvaluationConfig:
        for key, several in (("pass_at", self.pass_at or ()), ("maj_at", self.maj_at)):
            if len(set(several)) < len(several):
                raise ValueError(f"evaluation.{key}={list(several)} names a k twice; leave one out")
            if several and max(several) > self.completions:
                name = f"{key.removesuffix('_at')}@{max(several)}"
                raise ValueError(
                    f"evaluation.{key}={list(several)} and evaluation.completions={self.completions}: {name} is about "
                    f"{max(several)} completions of one problem, and there are {self.completions}; set "
                    f"evaluation.completions={max(several)} or more, or ask for a smaller k"
                )
        if self.correct is not None and self.pass_at == () and not self.maj_at:
            raise ValueError(
                f"evaluation.correct={self.correct!r} would never be used with pass_at=[] and maj_at=[]; leave it out, "
                "or ask for a k"
            )
        if self.temperature == 0 and self.completions > 1:
            raise ValueError(
                f"evaluation.temperature=0 makes all evaluation.completions={self.completions} of a problem the same "
                "one; set evaluation.completions=1"
            )
        return self

    def correct_part(self, reward: RewardConfig) -> str | None:
        """The part of the reward that says what is correct; None where nothing asks for it.

        Raises ValueError where the recipe does not decide it, or where maj@k finds no answers to count.
        """
        if self.pass_at == () and not self.maj_at:
            return None
        parts = reward.all_parts
        if self.correct is not None and self.correct not in parts:
            raise ValueError(
                f"evaluation.correct={self.correct!r} is no part of the reward{nearest(self.correct, parts)}"
            )
        if self.correct is not None and parts[self.correct].function in (None, "length", "soft_overlong"):
            raise ValueError(
                f"evaluation.correct={self.correct!r} names a part whose value says how good or long a completion is, "
                "not whether it is right; name one that gives 1 to what is right, or leave it out"
            )
        name = self.correct or _decisive(parts)
        if name is None and self.pass_at is None and not self.maj_at:
            return None
        if name is None:
            asked = "pass_at" if self.pass_at else "maj_at"
            raise ValueError(
                f"evaluation.{asked}={list(getattr(self, asked))} asks which completions are correct, and the reward "
                f"({', '.join(parts)}) does not say it: no part compares with the answer; name in evaluation.correct "
                f"the part whose value of 1 means correct, or set evaluation.{asked}=[]"
            )
        if self.maj_at and not has_answers(parts[name]):
            raise ValueError(
                f"evaluation.maj_at={list(self.maj_at)} counts answers, and {reward.key(name)}.function="
                f"{parts[name].function} finds none in a completion; leave maj_at out, or name in evaluation.correct "
                "a part of exact, math_verify, reasoning_gym or regex with a group"
            )
        return name

    def passes(self, reward: RewardConfig) -> tuple[int, ...]:
        """The k of pass@k."""
        if self.pass_at is not None:
            return self.pass_at
        return () if self.correct_part(reward) is None else (1,)


def has_answers(part: PartConfig) -> bool:
    """Whether a part takes an answer out of a completion, and compares it with the reference."""
    with_group = part.function == "regex" and part.options["group"] is not None
    return part.function in ("exact", "math_verify", "reasoning_gym") or with_group


def _decisive(parts: dict[str, PartConfig]) -> str | None:
    """The first part that compares with the answer; else the only function of one's own (or pattern); else `format`."""
    comparing = [name for name, part in parts.items() if has_answers(part)]
    if comparing:
        return comparing[0]
    functions = {
        name: part for name, part in parts.items() if part.function is not None
    }  # a model's score is no verdict
    own = [name for name, part in functions.items() if part.function not in OPTIONS or part.function == "regex"]
    shape = [name for name, part in parts.items() if part.function == "format"]
    candidates = own or shape  # a length penalty is never 1
    return candidates[0] if len(candidates) == 1 else None
