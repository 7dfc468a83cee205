"""The recipe of `grpo-mega reward`: a reward model trained from preferences or labels."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from grpo_mega.config.base import Name, NonNegative, Positive, Section
from grpo_mega.config.parallel import ParallelConfig
from grpo_mega.config.recipe import ModelConfig, OptimizerConfig, RunConfig, check_schedule


class RewardPrecisionConfig(Section):
    dtype: Literal["bf16", "fp32"] = "fp32"


class RewardDataConfig(Section):
    jsonl: Name  # a line: {prompt, chosen, rejected}, or {prompt, completion, label}, all lines alike
    heldout: NonNegative = 64  # problems kept out of training, for evaluation
    max_tokens: Positive | None = None  # the most tokens of a conversation; default: what the model's context holds


class RewardBatchConfig(Section):
    examples_per_step: Positive = 32  # rows of the file in one optimizer update
    tokens_per_microbatch: Positive = 1024


class RewardRecipe(Section):
    # a folder of XForSequenceClassification goes on from its head; one of a language model gets one that begins at 0
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: RewardPrecisionConfig = RewardPrecisionConfig()
    data: RewardDataConfig
    batch: RewardBatchConfig = RewardBatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _across_sections(self) -> RewardRecipe:
        check_schedule(self.optimizer, self.run)
        return self
