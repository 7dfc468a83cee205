"""One entry of the recipe's `reward_models` section: a model whose head gives a number for a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo_mega.config.base import Name, Positive, Section
from grpo_mega.config.parallel import OwnLayoutConfig


class ContinualConfig(Section):
    """A reward model that is trained on while the policy is, by what a verifier says of its completions
    (trainer/reward_replay)."""

    labels: Name  # the part of the reward whose values, 0 to 1, are the labels; its weight may be 0
    every: Positive  # steps of an outer iteration: before every so many steps it learns from those
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.1  # the share of completions of earlier iterations among all
    lr: Annotated[float, Field(gt=0)] = 1e-6
    examples_per_step: Positive = 32  # completions of one optimizer update; each is seen once


class RewardModelConfig(OwnLayoutConfig):
    path: Name  # a Hugging Face folder of XForSequenceClassification or XForTokenClassification, one label or two
    tokenizer: Name | None = None  # another folder's tokenizer, or a sentencepiece .model file; default: of path
    dtype: Literal["bf16", "fp32"] | None = None  # default: precision.dtype
    # a process reward model: it reads this behind each of the steps that reward.steps marks, and the step's value is
    # what it scores there; it serves parts that are per_step
    separator: Name | None = None
    # a conversation of more tokens is not scored: an error of that completion; default: what the model's context holds
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    train: ContinualConfig | None = None  # default: it stays as it is

    @model_validator(mode="after")
    def _learns(self) -> RewardModelConfig:
        if self.train is not None and self.separator is not None:
            raise ValueError(
                "train and separator are both given: labels are of whole completions, and a process reward model "
                "scores steps; leave one of them out"
            )
        return self
