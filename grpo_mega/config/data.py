"""The recipe's `data` section: where prompts come from, in which proportions, and how they are put."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_mega.config.base import Name, NonNegative, Positive, Section

PLACES = ("jsonl", "parquet", "dataset", "reasoning_gym")


class PlaceConfig(Section):
    """One place that rows come from: exactly one of the first four keys says which."""

    jsonl: Name | None = None  # a file of one JSON object a line
    parquet: Name | None = None  # a Parquet file
    dataset: Name | None = None  # a folder that `datasets` saved, or one of Parquet or JSONL files
    reasoning_gym: Name | None = None  # the name of a reasoning-gym task
    split: Name | None = None  # of a dataset; may be left out when it has one
    task: dict[str, Any] = Field(default_factory=dict)  # the reasoning-gym task's own parameters


class SourceConfig(PlaceConfig):
    prompt_field: Name | None = None  # default: data.prompt_field
    answer_field: Name | None = None  # default: data.answer_field

    @model_validator(mode="after")
    def _source(self) -> SourceConfig:
        _check_place(self, "")
        for key in ("prompt_field", "answer_field"):
            if self.reasoning_gym is not None and getattr(self, key) is not None:
                raise ValueError(f"{key}: a reasoning-gym task has fields of its own; leave it out")
        return self


class MixtureSourceConfig(SourceConfig):
    weight: Annotated[float, Field(gt=0)] = 1.0  # its share of the prompts, relative to the other sources' weights


class DataConfig(PlaceConfig):
    sources: Annotated[tuple[MixtureSourceConfig, ...], Field(strict=False)] = ()  # several, instead of the one above
    prompt_field: Name = "prompt"  # a text, or a list of {role, content}; "a.b" is field b of field a
    answer_field: Name = "answer"
    system: str | None = None  # system message of the chat template; default: the template's own
    instruction: str = "{prompt}"  # the (last) user message; {prompt} is replaced by the data row's prompt
    chat_template: Name | None = None  # a Jinja file; default: the tokenizer's own template
    max_prompt_tokens: Positive | None = None  # default: what the context leaves beside a completion
    # a longer prompt: an error, a row less (counted), or only its last tokens (counted)
    overlong: Literal["refuse", "skip", "truncate_left"] = "refuse"
    heldout: NonNegative = 64  # problems kept out of training, for evaluation; with heldout_source at most so many
    heldout_source: SourceConfig | None = None  # a source of its own for them

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        if self.sources:
            for key in (*PLACES, "split", "task"):
                if getattr(self, key):
                    raise ValueError(
                        f"data.{key} and data.sources are both given; move data.{key} into an entry of data.sources"
                    )
        elif self.trains or self.heldout_source is None or self.split is not None or self.task:
            _check_place(self, "data.")
        training = self.sources or ((self,) if self.trains else ())
        places = (*training, *([] if self.heldout_source is None else [self.heldout_source]))
        if all(place.reasoning_gym is not None for place in places):
            for key, default in (("prompt_field", "prompt"), ("answer_field", "answer")):
                if getattr(self, key) != default:
                    raise ValueError(
                        f"data.{key}={getattr(self, key)} would never be used: a reasoning-gym task has fields of its "
                        "own; leave it out"
                    )
        if "{prompt}" not in self.instruction:
            raise ValueError(f"data.instruction={self.instruction!r} does not contain {{prompt}}; put it in")
        if self.heldout_source is not None and self.heldout == 0:
            raise ValueError("data.heldout=0 would leave data.heldout_source unused; leave one of them out")
        return self

    @property
    def trains(self) -> bool:
        """Whether there is a source to train on; a recipe for `grpo-mega eval` may have a held-out source alone."""
        return bool(self.sources) or any(getattr(self, key) is not None for key in PLACES)


def _check_place(place: PlaceConfig, prefix: str) -> None:
    """Raise ValueError unless exactly one place is given, and only keys that it reads."""
    given = [key for key in PLACES if getattr(place, key) is not None]
    if len(given) != 1:
        found = " and ".join(prefix + key for key in given) + " are given" if given else "no source is given"
        names = ", ".join(prefix + key for key in PLACES)
        more = ", or a list data.sources" if prefix else ""
        raise ValueError(f"{found}; give exactly one of {names}{more}")
    for key, owner in (("split", "dataset"), ("task", "reasoning_gym")):
        if getattr(place, key) and given != [owner]:
            raise ValueError(
                f"{prefix}{key}={getattr(place, key)!r} would not be used by {prefix}{given[0]}; leave it out (it "
                f"belongs to {prefix}{owner})"
            )
