"""The recipe's `reward` section: what a completion is worth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from grpo_mega.config.base import Name, NonNegative, Positive, Section, nearest
from grpo_mega.config.reward_model import RewardModelConfig

CpuSeconds = Annotated[float, Field(gt=0, le=3600)]


class NoOptions(Section):
    """`exact` has nothing to set."""


class ReasoningGymOptions(Section):
    strict: bool = True  # count only a full score; false: what the task's scorer gives
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)  # task -> its parameters, where scorers read them
    time_limit: CpuSeconds = 5.0  # of one completion


class MathVerifyOptions(Section):
    time_limit: CpuSeconds = 5.0


class RegexOptions(Section):
    pattern: Name
    match: Literal["search", "fullmatch"] = "search"
    group: NonNegative | Name | None = None  # the group whose text must equal the answer; default: a match is enough
    time_limit: CpuSeconds = 1.0

    @model_validator(mode="after")
    def _compiles(self) -> RegexOptions:
        try:
            pattern = re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression ({error}); mend it") from None
        known = range(pattern.groups + 1) if isinstance(self.group, int) else pattern.groupindex
        if self.group is not None and self.group not in known:
            raise ValueError(
                f"group={self.group!r} is not in the pattern {self.pattern!r}, which has {pattern.groups} groups; put "
                "parentheses around the answer there"
            )
        return self


class FormatOptions(Section):
    tags: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] = ("think", "answer")
    opened: bool = False  # the prompt's template ends in the first opening tag, so that completions lack it

    @model_validator(mode="after")
    def _tags(self) -> FormatOptions:
        for tag in self.tags:
            if re.search(r"[<>/\s]", tag):
                raise ValueError(f"tags: {tag!r} is no tag's name; write think for <think>...</think>")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags={list(self.tags)} names a tag twice; each stands once in a completion")
        return self


class LengthOptions(Section):
    shape: Literal["linear", "cosine"] = "linear"
    start: NonNegative = 0  # tokens that cost nothing
    end: Positive | None = None  # tokens at which the penalty is -1; default: sampling.max_completion_tokens


class SoftOverlongOptions(Section):
    cache: Positive  # L_cache: the last tokens before sampling.max_completion_tokens, over which the penalty grows


OPTIONS: dict[str, type[Section]] = {
    "exact": NoOptions,
    "reasoning_gym": ReasoningGymOptions,
    "math_verify": MathVerifyOptions,
    "regex": RegexOptions,
    "format": FormatOptions,
    "length": LengthOptions,
    "soft_overlong": SoftOverlongOptions,
}


class PartConfig(Section):
    """One part of a reward: a function or a model. Of a built-in function the options are complete, defaults written
    out."""

    function: str | None = None  # a name of OPTIONS, or package.module:function
    model: Name | None = None  # or an entry of reward_models
    weight: float = 1.0  # 0: only logged
    options: dict[str, Any] = Field(default_factory=dict)  # a function of your own gets them as keyword arguments
    batch: bool = False  # of your own: called with lists, once a step and replica
    # a model scores steps; a function of your own is called with a completion's reasoning steps, and gives a list, too
    per_step: bool = False


class StepsConfig(Section):
    """Process supervision: where a completion's reasoning steps end (rewards/steps)."""

    delimiter: Name | None = None  # in the text; default: "\n\n"
    every_tokens: Positive | None = None  # or steps of so many tokens each (segments, as of arXiv:2505.23564)

    @model_validator(mode="after")
    def _one_kind(self) -> StepsConfig:
        if self.delimiter is not None and self.every_tokens is not None:
            raise ValueError(
                f"reward.steps.delimiter={self.delimiter!r} and every_tokens={self.every_tokens} are two ways to mark "
                "a step's end; give one of them"
            )
        return self

    @property
    def marks(self) -> dict[str, Any]:
        """As `rewards/steps` takes them."""
        if self.every_tokens is not None:
            return {"every": self.every_tokens}
        return {"delimiter": self.delimiter or "\n\n"}


class RewardConfig(Section):
    function: str | None = None  # the only part, of weight 1; default: exact
    model: Name | None = None  # or this one of reward_models
    options: dict[str, Any] = Field(default_factory=dict)
    batch: bool = False
    parts: dict[str, PartConfig] = Field(default_factory=dict)  # or several: the reward is their weighted sum
    # given: process supervision. Parts with `per_step` score each step, what the others give goes to the last one
    steps: StepsConfig | None = None
    # what a completion cut by the length limit gets: its reward, no part in the loss, or `truncation_reward`
    truncated: Literal["reward", "mask", "penalize"] = "reward"
    truncation_reward: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, tree: Any) -> Any:
        """Functions and options are looked at here, where a message can name the part."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("parts") or {}, Mapping):
            return tree
        tree, single = dict(tree), ("function", "model", "options", "batch")
        if not tree.get("parts"):
            part = {key: tree[key] for key in single if key in tree}
            if part.get("model") is None:
                part["function"] = part.get("function") or "exact"
            return tree | _checked_part("reward", part)
        for key in single:
            if tree.get(key):
                raise ValueError(f"reward.{key} and reward.parts are both given; move reward.{key} into a part")
        tree["parts"] = {name: _checked_part(_where(name), part) for name, part in tree["parts"].items()}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.truncation_reward and self.truncated != "penalize":
            raise ValueError(
                f"reward.truncation_reward={self.truncation_reward} would never be paid with reward.truncated="
                f"{self.truncated}; set reward.truncated=penalize, or leave it out"
            )
        scoring = [name for name, part in self.all_parts.items() if part.per_step]
        if scoring and self.steps is None:
            raise ValueError(
                f"{self.key(scoring[0])}.per_step=true scores reasoning steps, and nothing says where they end; set "
                'reward.steps, say {delimiter: "\\n\\n"}'
            )
        if self.steps is not None and not scoring:
            raise ValueError(
                f"reward.steps={self.steps.marks} marks reasoning steps, and no part scores them; give one "
                "per_step: true, or leave reward.steps out"
            )
        for name in scoring:
            if self.all_parts[name].function in OPTIONS:
                raise ValueError(
                    f"{self.key(name)}.function={self.all_parts[name].function} scores whole completions, not the "
                    "steps that reward.steps marks; use a function of your own (beside it, under reward.parts)"
                )
        return self

    @property
    def all_parts(self) -> dict[str, PartConfig]:
        """Every part by its name in metrics and errors; the only part has its function's name, or its model's."""
        per_step = self.steps is not None  # the only part is what the steps are for
        if self.function is not None:
            part = PartConfig(function=self.function, options=self.options, batch=self.batch, per_step=per_step)
            return {self.function: part}
        return dict(self.parts) if self.model is None else {self.model: PartConfig(model=self.model, per_step=per_step)}

    def check_lengths(self, max_completion_tokens: int) -> None:
        """Raise ValueError for a length penalty that completions of at most `max_completion_tokens` never meet."""
        for name, part in self.all_parts.items():
            where = f"{self.key(name)}.options"
            if part.function == "length":
                end = part.options["end"] or max_completion_tokens
                if part.options["start"] >= min(end, max_completion_tokens):
                    raise ValueError(
                        f"{where}.start={part.options['start']} is not below end={end} and sampling."
                        f"max_completion_tokens={max_completion_tokens}: the penalty would never be paid; lower start"
                    )
            if part.function == "soft_overlong" and part.options["cache"] > max_completion_tokens:
                raise ValueError(
                    f"{where}.cache={part.options['cache']} exceeds sampling.max_completion_tokens="
                    f"{max_completion_tokens}; lower it (DAPO's is a fifth)"
                )

    def check_models(self, known: Mapping[str, RewardModelConfig]) -> None:
        """Raise ValueError unless the parts' models are those of `reward_models`, all of them, each for what it is."""
        for name in known:
            check_name(name, "reward_models", "a model")
        used = set()
        for name, part in self.all_parts.items():
            if part.model is None:
                continue
            key = f"{self.key(name)}.model={part.model}"
            if part.model not in known:
                hint = nearest(part.model, known) if known else "; write that section"
                raise ValueError(f"{key} is no entry of reward_models{hint}")
            if part.per_step and known[part.model].separator is None:
                raise ValueError(
                    f"{key} is to score steps, and reward_models.{part.model}.separator does not say what it reads "
                    "behind each; set it"
                )
            if not part.per_step and known[part.model].separator is not None:
                raise ValueError(
                    f"{key} scores steps (reward_models.{part.model}.separator is set), and the part is not per_step; "
                    "make it per_step: true with reward.steps, or leave the separator out"
                )
            used.add(part.model)
        for name, model in known.items():
            if model.train is not None:
                self._check_labels(name, model.train.labels)
        for name in known:
            if name not in used:
                raise ValueError(
                    f"reward_models.{name} is used by no part of the reward; write reward.model={name}, or a part "
                    f"{{model: {name}}} (weight 0: only logged), or leave it out"
                )

    def _check_labels(self, model: str, labels: str) -> None:
        part = self.all_parts.get(labels)
        if part is None or part.function is None or part.per_step:
            known = [name for name, p in self.all_parts.items() if p.function is not None and not p.per_step]
            remedy = nearest(labels, known) if known else "; give one, of weight 0 if it is to pay nothing"
            raise ValueError(
                f"reward_models.{model}.train.labels={labels} is no part of the reward whose function judges whole "
                f"completions{remedy}"
            )

    def key(self, name: str) -> str:
        """Where the recipe says what the part `name` is."""
        return f"reward.parts.{name}" if self.parts else "reward"


def _where(name: Any) -> str:
    check_name(name, "reward.parts", "a part")
    return f"reward.parts.{name}"


def check_name(name: Any, section: str, what: str) -> None:
    """Raise ValueError unless `name`, which a user has given to an entry, can stand in keys and metrics."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{section}: {name!r} cannot name {what}; use letters, digits, _ and -")


def _checked_part(where: str, part: Any) -> Any:
    """The part with its built-in function's options complete; raises ValueError naming the key, value and remedy."""
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}={part!r} is no mapping; write {{function: ...}} or {{model: ...}}")
    for key in part:
        if key not in PartConfig.model_fields:
            raise ValueError(f"unknown key {where}.{key}{nearest(str(key), PartConfig.model_fields)}")
    if part.get("model") is not None:
        return _checked_model(where, part)
    if part.get("function") is None:
        raise ValueError(f"{where} says neither function nor model; write one of them")
    function, options = part.get("function"), part.get("options") or {}
    if not isinstance(function, str) or not isinstance(options, Mapping):
        return part  # for the sections' own checks
    if function not in OPTIONS:
        module, colon, name = function.partition(":")
        if not (module and colon and name):
            raise ValueError(
                f"{where}.function={function!r} is neither package.module:function (my_rewards:score for score() in "
                f"./my_rewards.py) nor built in{nearest(function, OPTIONS)}"
            )
        return part
    if part.get("batch"):
        raise ValueError(f"{where}.batch=true is for functions of your own; leave it out for {function}")
    return {**part, "options": _checked_options(f"{where}.options", function, options)}


def _checked_model(where: str, part: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("function", "options", "batch"):
        if part.get(key):
            raise ValueError(
                f"{where}.model={part['model']!r} and {where}.{key} are both given; a part is a function or a model"
            )
    return part


def _checked_options(where: str, function: str, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return OPTIONS[function].model_validate(dict(options)).model_dump()
    except ValidationError as error:
        # a misspelt option before the one that is missing for it
        item = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    key = ".".join([where, *map(str, item["loc"])])
    message = item["msg"].removeprefix("Value error, ")
    message = re.sub(r"^\w+ should", "should", message)
    if item["type"] == "extra_forbidden":
        known = OPTIONS[function].model_fields
        what = nearest(str(item["loc"][-1]), known) if known else "; it has none, leave it out"
        raise ValueError(f"{key} is no option of {function}{what}")
    if item["type"] == "missing":
        raise ValueError(f"{key} is missing; {function} cannot do without it")
    if item["type"] == "value_error":
        raise ValueError(f"{where}.{message}")
    raise ValueError(f"{key}={item['input']!r} {message}")
