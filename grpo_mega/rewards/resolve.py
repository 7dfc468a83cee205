"""From the recipe's `reward` section to parts that can be called, and what their rows must hold."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from grpo_mega.config.reward import OPTIONS, PartConfig, RewardConfig
from grpo_mega.errors import DataError, RewardError
from grpo_mega.rewards.exact import exact
from grpo_mega.rewards.format import tagged
from grpo_mega.rewards.length import length, soft_overlong
from grpo_mega.rewards.math_verify import math_verify
from grpo_mega.rewards.reasoning_gym import check_task_of, reasoning_gym
from grpo_mega.rewards.regex import regex

# (the completion's text, the prompt's reference answer if it has one, the prompt's whole data row) -> the reward;
# a batch function takes and returns lists of these. Keywords beside them: EXTRAS asked for, and the part's options.
RewardFunction = Callable[..., Any]

EXTRAS = ("token_ids", "finish_reason")  # what of a Completion a function gets that has a keyword-only parameter for it

# name -> (its options, sampling.max_completion_tokens) -> the function
BUILT_IN: dict[str, Callable[[Any, int], RewardFunction]] = {
    "exact": lambda options, limit: exact,
    "reasoning_gym": lambda options, limit: reasoning_gym(options),
    "math_verify": lambda options, limit: math_verify(options),
    "regex": lambda options, limit: regex(options),
    "format": lambda options, limit: tagged(options),
    "length": length,
    "soft_overlong": soft_overlong,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a reward: `weight` times its value is added. `extras` are those of EXTRAS that its function asks for.

    per_step: it is called with the list of a completion's reasoning steps in the text's place, and gives a list.
    Of a part with a `model` (an entry of the recipe's reward_models) the values are given, and `function` is None.
    """

    name: str
    weight: float
    function: RewardFunction | None
    batch: bool = False
    extras: tuple[str, ...] = ()
    per_step: bool = False
    model: str | None = None


def resolve_reward(config: RewardConfig, max_completion_tokens: int) -> tuple[Part, ...]:
    """The parts of the recipe's reward, in its order. Functions of your own may lie in the current directory.

    Raises RewardError for a module that does not import, and for a function that is not there or cannot be called as
    function(text, answer, row, **options), and for tasks of reasoning-gym that do not exist.
    """
    return tuple(_part(config.key(name), name, part, max_completion_tokens) for name, part in config.all_parts.items())


def check_row(config: RewardConfig, origin: str, answer: str | None, row: Mapping[str, Any]) -> None:
    """Raise DataError naming the row (`origin`) unless it holds what the built-in functions compare with."""
    for name, part in config.all_parts.items():
        compares = part.function in ("exact", "math_verify") or (
            part.function == "regex" and part.options["group"] is not None
        )
        if compares and answer is None:
            raise DataError(
                f"{origin} has no answer, which {config.key(name)}.function={part.function} compares with; name the "
                "field that holds it in data.answer_field, or use a reward function of your own"
            )
        if part.function == "reasoning_gym":
            try:
                check_task_of(row)
            except RewardError as error:
                raise DataError(f"{origin}: {error}") from None


def _part(key: str, name: str, config: PartConfig, max_completion_tokens: int) -> Part:
    if config.function is None:
        return Part(name, config.weight, None, per_step=config.per_step, model=config.model)
    if config.function in OPTIONS:
        options = OPTIONS[config.function].model_validate(config.options)
        try:
            function = BUILT_IN[config.function](options, max_completion_tokens)
        except RewardError as error:
            raise RewardError(f"{key}.options: {error}") from None
        return Part(name, config.weight, function, extras=_extras(function))
    function = _own(config.function, key, config.batch)
    _check_signature(function, config, f"{key}.function={config.function!r}")
    if config.options:
        function = partial(function, **config.options)
    return Part(name, config.weight, function, config.batch, _extras(function), config.per_step)


def _own(name: str, key: str, batch: bool) -> Any:
    said = f"{key}.function={name!r}"
    module_name, _, attribute = name.partition(":")
    module = _import(module_name, said)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1, cutoff=0.5)
        arguments = "texts, answers, rows" if batch else "text, answer, row"
        hint = f"did you mean {near[0]!r}?" if near else f"define {attribute}({arguments}) there"
        raise RewardError(f"{said}: module {module_name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


def _import(module_name: str, said: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # SystemExit: a script without a __main__ guard would end the run unseen
        raise RewardError(
            f"{said}: module {module_name} does not import ({type(error).__name__}: {error}); "
            f"it is looked for in {here} and on PYTHONPATH"
        ) from error


def _check_signature(function: Any, config: PartConfig, said: str) -> None:
    if not callable(function):
        raise RewardError(f"{said} is of type {type(function).__name__}, which cannot be called; name a function")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"{said} is an async function, which returns no number; call asyncio.run in a plain one")
    for extra in EXTRAS:
        if extra in config.options:
            raise RewardError(f"{said} gets {extra} of each completion; give the option {extra} another name")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions written in C have none
        return
    try:
        signature.bind("", None, {}, **config.options, **dict.fromkeys(_extras(function)))
    except TypeError as error:
        text = "list of steps" if config.per_step else "text"
        what = f"the completion's {text}, the answer (or None) and the data row"
        if config.batch:
            what = f"lists of the completions' {text}s, their answers and their data rows"
        options = f", and its options as keywords ({', '.join(config.options)})" if config.options else ""
        raise RewardError(
            f"{said} has the signature {signature} ({error}), but is called with three positional arguments: {what}"
            f"{options}"
        ) from None


def _extras(function: RewardFunction) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):
        return ()
    return tuple(e for e in EXTRAS if e in parameters and parameters[e].kind is inspect.Parameter.KEYWORD_ONLY)
