"""What a recipe must not say beside `sampling.source`: where the completions come from that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grpo_mega.config.base import Section

if TYPE_CHECKING:
    from grpo_mega.config.recipe import Recipe


def check_source(recipe: Recipe) -> None:
    """Raise ValueError where a key contradicts sampling.source, or would never be used under it."""
    if recipe.sampling.source == "policy":
        for key, value in _completion_fields(recipe):
            raise ValueError(
                f"{key}={value} would never be used with sampling.source=policy, which samples completions; set "
                "sampling.source=data (grpo-mega sft does) to train on demonstrations, or leave it out"
            )
        return
    for key, (value, wanted, why) in _contradictions(recipe).items():
        if value != wanted:
            raise ValueError(
                f"{key}={_shown(value)} contradicts sampling.source=data: {why}; set {key}={_shown(wanted)}, as the "
                "preset sft has it"
            )
    for name, model in recipe.reward_models.items():
        if model.train is not None:
            raise ValueError(
                f"reward_models.{name}.train learns from the policy's completions, and sampling.source=data trains on "
                "demonstrations; leave it out"
            )
    if recipe.data.heldout == 0:
        for key, value in _of_sampling(recipe):
            raise ValueError(
                f"{key}={_shown(value)} would never be used with sampling.source=data and data.heldout=0, where "
                "nothing is sampled; leave it out, or hold out problems to evaluate on"
            )


def _completion_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every place that names the field of a demonstration, by its key."""
    named = {f"data.sources.{i}": entry.completion_field for i, entry in enumerate(recipe.data.sources)}
    for section, value in {"data": recipe.data.completion_field, **named}.items():
        if value is not None:
            yield f"{section}.completion_field", value


def _contradictions(recipe: Recipe) -> dict[str, tuple[Any, Any, str]]:
    """By key: its value, the one that demonstrations leave it, and why."""
    grpo, drawn = recipe.grpo, "the policy did not draw the tokens"
    return {
        "grpo.group_size": (grpo.group_size, 1, "a row has one demonstration"),
        "grpo.advantage": (grpo.advantage, "best_of_n", "there are no rewards to compare"),
        "grpo.best_above": (grpo.best_above, None, "there are no rewards to compare"),
        "grpo.surrogate": (grpo.surrogate, "logprob", f"{drawn}, so that an importance ratio says nothing"),
        "grpo.kl_coef": (grpo.kl_coef, 0.0, f"{drawn}, so that their log-probs estimate no KL"),
        "grpo.correction": (grpo.correction, "none", f"{drawn}, and there is no sampler to correct for"),
        "grpo.off_policy_threshold": (grpo.off_policy_threshold, None, f"{drawn}: all of them are off-policy"),
        "sampling.temperature": (recipe.sampling.temperature, 1.0, "the likelihood is the policy's own"),
    }


def _of_sampling(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The keys, with their values, that only samples and their rewards are for, and that are not left at defaults."""
    needed = ("source", "max_completion_tokens", "stop_token_ids", "temperature")
    for section, part, without in (("sampling", recipe.sampling, needed), ("reward", recipe.reward, ())):
        plain = type(part)()
        for key, value in part:
            if key not in without and value != getattr(plain, key):
                yield f"{section}.{key}", value
    if recipe.reward_models:
        yield "reward_models", ", ".join(recipe.reward_models)
    if recipe.precision.sampling is not None:
        yield "precision.sampling", recipe.precision.sampling
    if recipe.run.evaluate_every:
        yield "run.evaluate_every", recipe.run.evaluate_every


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump()
    return "null" if value is None else str(value)
