"""One entry of the recipe's `reward_models` section: a model whose head gives a number for a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_mega.config.base import Name
from grpo_mega.config.parallel import OwnLayoutConfig


class RewardModelConfig(OwnLayoutConfig):
    path: Name  # a Hugging Face folder of XForSequenceClassification or XForTokenClassification, one label or two
    tokenizer: Name | None = None  # another folder's tokenizer, or a sentencepiece .model file; default: of path
    dtype: Literal["bf16", "fp32"] | None = None  # default: precision.dtype
    # a process reward model: it reads this behind each of the steps that reward.steps marks, and the step's value is
    # what it scores there; it serves parts that are per_step
    separator: Name | None = None
    # a conversation of more tokens is not scored: an error of that completion; default: what the model's context holds
    max_tokens: Annotated[int, Field(ge=2)] | None = None
