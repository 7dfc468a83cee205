"""The recipe: one YAML file a run, typed, validated before anything is loaded, overridden by `--section.key value`.

A recipe states what to compute. How many ranks there are is not its business: data parallelism follows from the
world size. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grpo_mega.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Counts = Annotated[tuple[NonNegative, ...], Field(strict=False)]  # YAML has lists, no tuples


class Section(BaseModel):
    # strict: `save_every: true` is not 1, and `num_steps: "10"` is not 10
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelConfig(Section):
    path: Name  # Hugging Face folder of the policy's first weights
    recompute: Literal["none", "full"] = "none"  # full: activations of a layer are computed again in the backward


class ReferenceConfig(Section):
    path: str | None = None  # frozen reference; default: the policy's first weights


class ParallelConfig(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    sequence: bool = False  # megatron's sequence parallelism: activations between layers are sharded over tensor ranks
    pipeline_layout: Counts | None = None  # layers of each stage; default: balanced by cost

    @model_validator(mode="after")
    def _layout(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor > 1; set parallel.sequence=false")
        if self.pipeline_layout is not None and len(self.pipeline_layout) != self.pipeline:
            raise ValueError(
                f"parallel.pipeline_layout has {len(self.pipeline_layout)} stages but parallel.pipeline="
                f"{self.pipeline}; give one layer count a stage"
            )
        return self


class PrecisionConfig(Section):
    dtype: str = "fp32"

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        if value == "fp16":
            raise ValueError(
                "is refused: it keeps 11 bits of a ratio whose clip range is a few hundredths, and needs loss "
                "scaling that skips steps; use fp32"
            )
        if value != "fp32":
            raise ValueError("is not supported; use fp32")
        return value


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


class RewardConfig(Section):
    function: str = "exact"  # exact, or package.module:function
    # what a completion cut by the length limit gets: its reward, no part in the loss, or `truncation_reward`
    truncated: Literal["reward", "mask", "penalize"] = "reward"
    truncation_reward: float = 0.0


class SamplingConfig(Section):
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_completion_tokens: Positive = 256
    stop_token_ids: Counts = ()  # besides the tokenizer's end of sequence (and end of turn)
    max_rows: Positive = 64  # completions decoded together on one data-parallel rank


class GrpoConfig(Section):
    group_size: int = 8
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    num_iterations: Positive = 1  # the paper's mu
    normalization: Literal["sequence", "group_token", "token", "constant"] = "sequence"

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                "leaves nothing to compare a completion with: the standard deviation of a group of one is "
                "undefined; use 2 or more (DeepSeekMath uses 64)"
            )
        return value


class BatchConfig(Section):
    prompts_per_step: Positive = 8
    minibatches: Positive = 1  # optimizer updates a step and iteration
    tokens_per_microbatch: Positive = 1024  # rows of one forward; only a sequence longer than that exceeds it

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"batch.prompts_per_step={self.prompts_per_step} is not divisible by batch.minibatches="
                f"{self.minibatches}; every minibatch holds whole groups"
            )
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # never on norms and biases
    clip_grad: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient norm


class RunConfig(Section):
    directory: Name
    num_steps: Positive = 100
    seed: NonNegative = 0
    save_every: NonNegative = 0  # 0: only at the end
    evaluate_every: NonNegative = 0  # 0: only before and after


class Recipe(Section):
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _across_sections(self) -> Recipe:
        warmup, steps = self.optimizer.warmup_steps, self.run.num_steps
        if warmup > steps:
            raise ValueError(f"optimizer.warmup_steps={warmup} exceeds run.num_steps={steps}; warm up for fewer steps")
        if self.grpo.group_size > self.sampling.max_rows:
            raise ValueError(
                f"grpo.group_size={self.grpo.group_size} exceeds sampling.max_rows={self.sampling.max_rows}, the rows "
                "decoded together; raise max_rows, since a group is sampled as one"
            )
        if self.reference.path is not None and self.grpo.kl_coef == 0:
            raise ValueError(
                f"reference.path={self.reference.path} would never be used with grpo.kl_coef=0; leave it out, or give "
                "the KL term a weight"
            )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr={self.optimizer.min_lr} exceeds optimizer.lr={self.optimizer.lr}; lower min_lr"
            )
        return self

    @property
    def reference_path(self) -> str:
        return self.reference.path or self.model.path

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out: `load_recipe` of it gives the same recipe."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (YAML 1.1 asks for a dot) and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    overrides: ["--section.key", "value", "--section.key=value", ...]. A value is read as YAML (8, 1e-6, true, [1, 2]),
    except that a key which holds text takes it as it stands ("{prompt}" is YAML for a mapping); null unsets it.
    "--section", "{key: value}" gives a section anew: what the file says of it is gone.
    Raises ConfigError naming the file, the key, the value found and the remedy.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 ({error.reason} at byte {error.start}); save as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {_yaml_reason(error)}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds a {type(tree).__name__}"
        raise ConfigError(f"recipe {path} {found}; write its sections (model:, data:, run:, ...)")
    _check_sections(tree, str(path))
    for key, value in _parse_overrides(overrides):
        section, _, name = key.partition(".")
        if section not in Recipe.model_fields:
            raise ConfigError(f"--{key} names no recipe section{_nearest(section, Recipe.model_fields)}")
        if not name:
            if not isinstance(value, dict):
                raise ConfigError(f"--{key} names a section; write --{key}.key value, or --{key} '{{key: value}}'")
            tree[section] = value
            continue
        if tree.get(section) is None:
            tree[section] = {}
        _set(tree[section], name, value, key)
    return validate_recipe(tree, str(path))


def validate_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from nested dicts; every problem found is listed in one ConfigError."""
    try:
        return Recipe.model_validate({key: {} if value is None else value for key, value in tree.items()})
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_describe(item) for item in error.errors())) from None


def _check_sections(tree: dict[Any, Any], origin: str) -> None:
    for section, value in tree.items():
        if section not in Recipe.model_fields:
            raise ConfigError(f"{origin}: unknown section {section!r}{_nearest(str(section), Recipe.model_fields)}")
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{origin}: section {section!r} holds {value!r}; write its keys below it, indented")


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{word!r} is not an override; write --section.key value")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} lacks a value; write --{key} value")
            text = rest.pop(0)
        try:
            pairs.append((key, text if _holds_text(key) and text != "null" else yaml.load(text, Loader=_Loader)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}={text}: the value is not valid YAML: {_yaml_reason(error)}") from None
    return pairs


def _holds_text(key: str) -> bool:
    section, _, name = key.partition(".")
    fields = _fields(section)
    return name in fields and fields[name].annotation in (str, str | None)


def _fields(section: str) -> Mapping[str, Any]:
    annotation: Any = Recipe.model_fields[section].annotation if section in Recipe.model_fields else Section
    return annotation.model_fields


def _set(section: dict[str, Any], name: str, value: Any, key: str) -> None:
    head, _, tail = name.partition(".")
    if not tail:
        section[head] = value
        return
    child = section.setdefault(head, {})
    if not isinstance(child, dict):
        raise ConfigError(f"--{key}: {head!r} holds {child!r}, so it has no key {tail!r}; drop .{tail}")
    _set(child, tail, value, key)


def _nearest(word: str, known: Any) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" if mark else reason


def _describe(item: Any) -> str:
    """One problem as a sentence: a validator's message continues "section.key=value ..." unless it names its keys."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}{_nearest(str(item['loc'][-1]), _fields(item['loc'][0]))}"
    if item["type"] == "missing":
        if len(item["loc"]) == 1:
            return f"section {where} is missing; write {where}: and its keys below it"
        return f"{where} is missing and has no default; write it in the recipe or pass --{where} value"
    message, found = item["msg"].removeprefix("Value error, "), item["input"]
    if item["type"] == "value_error" and isinstance(found, dict):
        return message
    if item["type"] == "string_type":
        return f"{where}={found!r} was not read as text; put it in quotes"
    for pydantic_word, ours in _WORDS.items():
        message = message.replace(pydantic_word, ours)
    return f"{where}={found!r} {message}"


_WORDS = {"Input should": "should", "String should": "should", "valid tuple": "list", "valid dictionary": "mapping"}
