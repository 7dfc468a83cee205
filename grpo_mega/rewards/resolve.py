"""From the recipe's `reward.function` to something callable."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from grpo_mega.errors import RewardError
from grpo_mega.rewards.exact import exact

# (the completion's text, the prompt's reference answer if it has one, the prompt's whole data row) -> the reward
RewardFunction = Callable[[str, str | None, Mapping[str, Any]], float]

BUILT_IN: dict[str, RewardFunction] = {"exact": exact}


def resolve_reward(name: str) -> RewardFunction:
    """The function that `name` stands for: a built-in one ("exact"), or "package.module:function", imported.

    The current directory can be imported from, as under `python -m`. Raises RewardError for a name without a colon, a
    module that does not import, a function that is not there or cannot be called as function(text, answer, row).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RewardError(
            f"reward.function={name!r} is neither built in ({', '.join(BUILT_IN)}) nor of the form "
            "package.module:function; write, for example, my_rewards:score for score() in ./my_rewards.py"
        )
    module = _import(module_name, name)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"define {attribute}(text, answer, row) there"
        raise RewardError(f"reward.function={name!r}: module {module_name} has no {attribute!r}; {hint}")
    function = getattr(module, attribute)
    _check_signature(function, name)
    return function


def _import(module_name: str, name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # SystemExit: a script without a __main__ guard would end the run unseen
        raise RewardError(
            f"reward.function={name!r}: module {module_name} does not import ({type(error).__name__}: {error}); "
            f"it is looked for in {here} and on PYTHONPATH"
        ) from error


def _check_signature(function: Any, name: str) -> None:
    if not callable(function):
        raise RewardError(
            f"reward.function={name!r} is of type {type(function).__name__}, which cannot be called; name a function"
        )
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions written in C have none
        return
    try:
        signature.bind("", None, {})
    except TypeError as error:
        raise RewardError(
            f"reward.function={name!r} has the signature {signature} ({error}), but is called with three positional "
            "arguments: the completion's text, the answer (or None) and the data row"
        ) from None
