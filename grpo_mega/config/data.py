"""The recipe's `data` section: where prompts come from and how they are put."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from grpo_mega.config.base import NonNegative, Section


class DataConfig(Section):
    jsonl: str | None = None  # a file of one JSON object a line ...
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    reasoning_gym: str | None = None  # ... or the name of a reasoning-gym task
    task: dict[str, Any] = Field(default_factory=dict)  # the task's own parameters
    system: str | None = None  # system message of the chat template; default: the template's own
    instruction: str = "{prompt}"  # the user's message; {prompt} is replaced by the data row's prompt
    heldout: NonNegative = 64  # problems kept out of training, for evaluation

    @model_validator(mode="after")
    def _source(self) -> DataConfig:
        if (self.jsonl is None) == (self.reasoning_gym is None):
            found = "both" if self.jsonl is not None else "neither"
            raise ValueError(f"data.jsonl and data.reasoning_gym: {found} given; give exactly one of them")
        if "{prompt}" not in self.instruction:
            raise ValueError(f"data.instruction={self.instruction!r} does not contain {{prompt}}; put it in")
        return self
