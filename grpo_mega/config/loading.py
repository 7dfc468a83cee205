"""From a YAML file and `--section.key value` overrides to a Recipe, or to one error that lists what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from grpo_mega.config.base import Section, nearest
from grpo_mega.config.presets import expand, with_preset
from grpo_mega.config.recipe import Recipe
from grpo_mega.errors import ConfigError

Schema = TypeVar("Schema", bound=Section)


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


def to_yaml(recipe: Section) -> str:
    """The resolved recipe, every default written out: `load_recipe` of it gives the same recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, implied: str | None = None) -> Recipe:
    """Read, override and validate a recipe of `grpo-mega train`; see `load_as`."""
    return load_as(Recipe, path, overrides, implied=implied)


def validate_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from nested dicts, presets included; every problem found is listed in one ConfigError."""
    return validate_as(Recipe, tree, origin)


def load_as(
    schema: type[Schema], path: str | Path, overrides: Sequence[str] = (), *, implied: str | None = None
) -> Schema:
    """Read, override and validate a command's recipe. implied: a preset that counts beside those that it names.

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
    _check_sections(tree, str(path), schema)
    for key, value in _parse_overrides(overrides, schema):
        section, _, name = key.partition(".")
        if key == "preset" and schema is Recipe:
            tree[key] = value
            continue
        if section not in schema.model_fields:
            raise ConfigError(f"--{key} names no recipe section{nearest(section, schema.model_fields)}")
        if not name:
            if not isinstance(value, dict):
                raise ConfigError(f"--{key} names a section; write --{key}.key value, or --{key} '{{key: value}}'")
            tree[section] = value
            continue
        if tree.get(section) is None:
            tree[section] = {}
        _set(tree[section], name, value, key)
    return validate_as(schema, tree if implied is None else with_preset(tree, implied), str(path))


def validate_as(schema: type[Schema], tree: dict[str, Any], origin: str = "recipe") -> Schema:
    """A command's recipe from nested dicts; see `validate_recipe`."""
    if schema is Recipe:
        tree = expand(tree, origin)
    try:
        return schema.model_validate({key: {} if value is None else value for key, value in tree.items()})
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_describe(item, schema) for item in error.errors())) from None


def _check_sections(tree: dict[Any, Any], origin: str, schema: type[Section]) -> None:
    for section, value in tree.items():
        if section == "preset" and schema is Recipe:
            continue
        if section not in schema.model_fields:
            raise ConfigError(f"{origin}: unknown section {section!r}{nearest(str(section), schema.model_fields)}")
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{origin}: section {section!r} holds {value!r}; write its keys below it, indented")


def _parse_overrides(words: Sequence[str], schema: type[Section]) -> list[tuple[str, Any]]:
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
            pairs.append(
                (key, text if _holds_text(key, schema) and text != "null" else yaml.load(text, Loader=_Loader))
            )
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}={text}: the value is not valid YAML: {_yaml_reason(error)}") from None
    return pairs


def _holds_text(key: str, schema: type[Section]) -> bool:
    *parents, name = key.split(".")
    field = _fields(parents, schema).get(name)
    if field is None:
        return False
    choices = get_args(field.annotation) or (field.annotation,)
    plain = {get_args(item)[0] if get_origin(item) is Annotated else item for item in choices}
    return str in plain and plain <= {str, type(None)}


def _fields(path: Sequence[str | int], schema: type[Section]) -> Mapping[str, Any]:
    """The keys of the section at `path` ("data", "sources", 0); none where there is no section."""
    section: Any = schema
    for part in path:
        if str(part).isdigit():  # an entry of a list of sections, which its key has led to already
            continue
        field = section.model_fields.get(part)
        section = Section if field is None else _section_in(field.annotation)
    return section.model_fields


def _section_in(annotation: Any) -> type[Section]:
    """The section that a key holds: as it is, optional, or in a list; one without keys when it holds something else."""
    candidates = (annotation, *get_args(annotation))
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, Section)), Section)


def _set(parent: dict[str, Any] | list[Any], name: str, value: Any, key: str) -> None:
    head, _, tail = name.partition(".")
    place: Any = head
    if isinstance(parent, list):
        if not head.isdigit() or int(head) >= len(parent):
            raise ConfigError(
                f"--{key}: there is no entry {head!r} in a list of {len(parent)}; write a number below {len(parent)}, "
                "or give the whole list"
            )
        place = int(head)
    elif parent.get(head) is None:
        parent[head] = {}
    if not tail:
        parent[place] = value
        return
    child = parent[place]
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"--{key}: {head!r} holds {child!r}, so it has no key {tail!r}; drop .{tail}")
    _set(child, tail, value, key)


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" if mark else reason


def _describe(item: Any, schema: type[Section]) -> str:
    """One problem as a sentence: a validator's message continues "section.key=value ..." unless it names its keys.

    A validator of a nested section (an entry of data.sources) does not know where it stands: that is put before it.
    """
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}{nearest(str(item['loc'][-1]), _fields(item['loc'][:-1], schema))}"
    if item["type"] == "missing":
        if len(item["loc"]) == 1:
            return f"section {where} is missing; write {where}: and its keys below it"
        return f"{where} is missing and has no default; write it in the recipe or pass --{where} value"
    message, found = item["msg"].removeprefix("Value error, "), item["input"]
    if item["type"] == "value_error" and isinstance(found, dict):
        return message if len(item["loc"]) <= 1 else f"{where}: {message}"
    if item["type"] == "string_type":
        return f"{where}={found!r} was not read as text; put it in quotes"
    message = re.sub(r" or instance of \w+", "", message)
    for pydantic_word, ours in _WORDS.items():
        message = message.replace(pydantic_word, ours)
    return f"{where}={found!r} {message}"


_WORDS = {"Input should": "should", "String should": "should", "valid tuple": "list", "valid dictionary": "mapping"}
