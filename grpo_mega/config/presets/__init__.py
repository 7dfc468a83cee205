"""Named settings of published methods: a YAML of a few lines each, which a recipe's own keys override.

    preset: dapo                  # one
    preset: [gspo, icepop]        # or several that set different keys

Two presets that set one key to two values contradict each other: an error, since neither would be what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from grpo_mega.config.base import nearest
from grpo_mega.errors import ConfigError

Tree = dict[str, Any]


def names() -> list[str]:
    """Every preset there is."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def expand(tree: Mapping[str, Any], origin: str) -> Tree:
    """The recipe tree with its presets' keys below its own, and no `preset` any more. Raises ConfigError."""
    own = {section: value for section, value in tree.items() if section != "preset"}
    asked = tree.get("preset")
    if asked is None:
        return own
    several = [asked] if isinstance(asked, str) else asked
    if not isinstance(several, Sequence) or not all(isinstance(name, str) for name in several):
        raise ConfigError(f"{origin}: preset={asked!r} is no name; write preset: dapo, or a list of names")
    chosen: dict[str, dict[str, tuple[Any, str]]] = {}
    for name in several:
        for section, keys in _read(name, origin).items():
            for key, value in keys.items():
                before, by = chosen.setdefault(section, {}).setdefault(key, (value, name))
                if before != value:
                    raise ConfigError(
                        f"{origin}: the presets {by} and {name} contradict each other: {section}.{key}={before} and "
                        f"{value}; choose one of them, and write the other's keys that you want in the recipe"
                    )
    result = {section: {key: value for key, (value, _) in keys.items()} for section, keys in chosen.items()}
    for section, keys in own.items():
        below = result.get(section, {})
        result[section] = {**below, **(keys or {})} if isinstance(keys, dict) or keys is None else keys
    return result


def with_preset(tree: Mapping[str, Any], name: str) -> Tree:
    """The tree with `name` before the presets that it names (what is no list of names is left for `expand`)."""
    asked = tree.get("preset")
    more = [] if asked is None else [asked] if isinstance(asked, str) else asked
    return {**tree, "preset": [name, *more] if isinstance(more, list) else asked}


def _read(name: str, origin: str) -> Tree:
    if name not in names():
        raise ConfigError(f"{origin}: preset={name!r} is unknown{nearest(name, names())}")
    return yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))


def _folder() -> Any:
    return resources.files(__name__)
