"""What a run leaves behind: the resolved recipe, metrics, timings and rollouts, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_mega.config import Recipe, load_recipe, to_yaml
from grpo_mega.errors import ConfigError
from grpo_mega.objective.advantages import is_degenerate
from grpo_mega.types import Group, Mean, Metrics, Rollout

# settings that a resumed run may change: where, how long and in what portions, not what a step computes
FREE_SECTIONS = ("parallel",)
FREE_KEYS = {
    *(("run", key) for key in ("directory", "num_steps", "save_every", "evaluate_every")),
    ("sampling", "max_rows"),
    ("batch", "tokens_per_microbatch"),
    ("model", "recompute"),
}


def group_metrics(groups: Sequence[Group]) -> Metrics:
    """What a step sampled and scored: means over completions, and three counts.

    reward/NAME, of a reward of several parts: the part's mean, before its weight, over the completions it was asked
    about and did not fail on.

    reward_errors: completions whose reward function failed. degenerate_groups: groups whose rewards are all equal, so
    that they teach nothing. near_boundary_draws: draws that rounding could have decided otherwise.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    completions = [rollout.completion for rollout in rollouts]
    return {
        "reward": Mean(sum(rollout.reward for rollout in rollouts), count),
        "reward_errors": Mean(sum(rollout.error is not None for rollout in rollouts), 1),
        "degenerate_groups": Mean(sum(map(_is_degenerate, groups)), 1),
        "completion_tokens": Mean(sum(len(completion.token_ids) for completion in completions), count),
        "truncated": Mean(sum(completion.finish_reason == "length" for completion in completions), count),
        "near_boundary_draws": Mean(sum(completion.near_boundary for completion in completions), 1),
        **_part_metrics(rollouts),
    }


def _part_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    names = {name for rollout in rollouts for name, _ in rollout.parts}
    values = {name: [v for r in rollouts for n, v in r.parts if n == name and v is not None] for name in names}
    return {f"reward/{name}": Mean(sum(of), len(of)) for name, of in values.items()} if len(names) > 1 else {}


def _is_degenerate(group: Group) -> bool:
    import torch

    return is_degenerate(torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float64))


class RunDirectory:
    """The files of a run. Only the writing rank may write; every rank may ask where things are."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = Path(recipe.run.directory)
        self.checkpoints = self.path / "checkpoints"
        self.hf = self.path / "hf"

    def check(self) -> None:
        """Raise ConfigError if the directory cannot be written or holds a run with other settings."""
        existing = self.path / "recipe.yaml"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "no permission to write")
        except OSError as error:
            reason = "it is a file" if self.path.is_file() else error.strerror
            raise ConfigError(f"run.directory={self.path} cannot be used ({reason}); choose another") from None
        if existing.exists():
            for change in _differences(load_recipe(existing).model_dump(), self.recipe.model_dump()):
                raise ConfigError(
                    f"run.directory={self.path} holds a run with {change}; use another run.directory, or go on with "
                    "the settings it began with"
                )

    def open(self, first_step: int) -> None:
        """Write the resolved recipe and drop the lines of steps that are about to be run again."""
        (self.path / "rollouts").mkdir(exist_ok=True)
        _replace(self.path / "recipe.yaml", to_yaml(self.recipe))
        # a run begins with an evaluation of what it starts from, step first_step - 1
        for name, end in (("metrics", first_step), ("timings", first_step), ("evaluations", first_step - 1)):
            file = self.path / f"{name}.jsonl"
            if file.exists():
                lines = [line for line in file.read_text().splitlines() if _step(line) < end]
                _replace(file, "".join(line + "\n" for line in lines))

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """rollouts/step_000001.jsonl: a line a completion, in the step's global order; durable when this returns."""
        lines = [
            json.dumps(
                {
                    "prompt_index": group.prompt.index,
                    "completion": number,
                    "prompt": group.prompt.text,
                    "text": rollout.completion.text,
                    "answer": group.prompt.answer,
                    "reward": rollout.reward,
                    "parts": dict(rollout.parts),
                    "error": rollout.error,
                    "counts": rollout.counts,
                    "finish_reason": rollout.completion.finish_reason,
                    "token_ids": rollout.completion.token_ids,
                    "sampler_logprobs": rollout.completion.sampler_logprobs,
                }
            )
            for group in groups
            for number, rollout in enumerate(group.rollouts)
        ]
        _replace(self.path / "rollouts" / f"step_{step:06d}.jsonl", "".join(line + "\n" for line in lines))

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """A line more; a mean of nothing (nan: no token was trained) is null, since JSON knows no nan."""
        record = {key: None if value != value else value for key, value in record.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    """A record's step; after all others for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for section, values in now.items():
        if section in FREE_SECTIONS:
            continue
        for key, value in values.items():
            if (section, key) not in FREE_KEYS and before[section][key] != value:
                found.append(f"{section}.{key}={before[section][key]!r}, this recipe says {value!r}")
    return found
