"""What the self-test trains: small models with random weights, prompts, and rewards that follow from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from grpo_mega.config import Recipe, validate_recipe
from grpo_mega.config.recipe import PrecisionConfig
from grpo_mega.data.prompts import DataCounts
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.model.names import shapes
from grpo_mega.selftest.cases import Case
from grpo_mega.selftest.models import PROMPTS, VOCABULARY, settings_of, write_config
from grpo_mega.trainer.setup import Inputs
from grpo_mega.types import Completion, Group, Prompt, Rollout

STOPS = tuple(range(8))  # one draw in eleven ends a completion
STEPS = {"fp32": 3, "fp64": 1, "bf16": 1}  # later steps train on what rounding made of the weights: fp32's little


def write_model(folder: Path, kind: str) -> Path:
    """A Hugging Face folder (config.json, model.safetensors), the same on every rank."""
    write_config(folder, kind)
    generator = torch.Generator().manual_seed(20240203)
    tensors = {}
    for name, shape in shapes(read_architecture(folder)).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else 0.12 * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe_of(case: Case, folder: Path, dtype: str) -> Recipe:
    """The case as a recipe. fp64, which recipes refuse since megatron's optimizer does, is let through here."""
    recipe = validate_recipe(settings_of(case, folder), f"case {case.name}")
    return recipe.model_copy(update={"precision": PrecisionConfig.model_construct(dtype=dtype)})


class _Tokenizer:
    """What a sampler asks of one."""

    stop_token_ids = STOPS

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


def inputs_of(recipe: Recipe) -> Inputs:
    """A run's inputs as far as `build_run` reads them."""
    arch = read_architecture(recipe.model.path)
    absent = cast(Any, None)
    return Inputs(
        arch=arch, tokenizer=cast(Any, _Tokenizer()), prompts=absent, heldout=[], data=cast(DataCounts, absent),
        reward=(), directory=absent,
        layers=layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout),
    )  # fmt: skip


def prompts(step: int) -> list[Prompt]:
    """PROMPTS prompts of 1 to 15 tokens."""
    generator = torch.Generator().manual_seed(step)
    return [
        Prompt(
            index=step * PROMPTS + n,
            text="",
            token_ids=tuple(torch.randint(VOCABULARY, (1 + 2 * n,), generator=generator).tolist()),
        )
        for n in range(PROMPTS)
    ]


def scored(step: int, completions: Sequence[Sequence[Completion]]) -> list[Group]:
    """Rewards by token ids; of each step's groups the third ends alike (advantage 0) and cut completions do not count.

    In the place of their sampler log-probs, which no loss reads here, trained tokens carry a number of their own: by it
    the log-probs of a layout are laid beside those of another.
    """
    groups, number = [], 0
    for place, (prompt, several) in enumerate(zip(prompts(step), completions, strict=True)):
        rollouts = []
        for completion in several:
            count = len(completion.token_ids)
            numbered = replace(completion, sampler_logprobs=tuple(float(number + i) for i in range(count)))
            number += count
            reward = 0.5 if place == 2 else sum(completion.token_ids) % 7 / 6
            rollouts.append(Rollout(numbered, reward, counts=completion.finish_reason == "stop"))
        groups.append(Group(prompt, tuple(rollouts)))
    return groups
