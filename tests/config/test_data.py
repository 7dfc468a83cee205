"""The recipe's data section: which keys go together, and what overrides do to nested ones."""

from __future__ import annotations

import pytest
import yaml

from grpo_mega.config import load_recipe, to_yaml
from grpo_mega.errors import ConfigError

JSONL, PARQUET = {"jsonl": "train.jsonl", "weight": 3}, {"parquet": "more.parquet", "prompt_field": "question"}


@pytest.fixture
def load(tmp_path):
    """load({data keys}, *override words) -> the recipe's data section."""

    def load(data, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": {"path": "w"}, "data": data, "run": {"directory": "o"}}))
        recipe = load_recipe(path, overrides)
        path.write_text(to_yaml(recipe))
        assert load_recipe(path) == recipe  # what a run directory keeps
        return recipe.data

    return load


def test_one_source_or_a_list_of_them(load):
    assert load({"parquet": "p"}).parquet == "p"
    data = load({"dataset": "folder", "split": "train"})
    assert (data.dataset, data.split, data.sources, data.overlong) == ("folder", "train", (), "refuse")
    first, second = load({"sources": [JSONL, PARQUET]}).sources
    assert (first.jsonl, first.weight, first.prompt_field) == ("train.jsonl", 3.0, None)
    assert (second.parquet, second.weight, second.prompt_field) == ("more.parquet", 1.0, "question")
    heldout = load({"jsonl": "d", "heldout_source": {"dataset": "folder", "split": "test"}}).heldout_source
    assert (heldout.dataset, heldout.split) == ("folder", "test")


def test_overrides_reach_into_the_list_and_into_the_held_out_source(load):
    data = load(
        {"sources": [JSONL, PARQUET]},
        *("--data.sources.1.weight", "1e-1", "--data.sources.0.jsonl=007", "--data.sources.1.prompt_field", "null"),
        *("--data.heldout_source.reasoning_gym", "gcd", "--data.heldout_source.task.size=5"),
        *("--data.overlong", "skip", "--data.max_prompt_tokens", "100", "--data.chat_template=1e5"),
    )
    assert [(s.weight, s.prompt_field) for s in data.sources] == [(3.0, None), (0.1, None)]
    assert (data.sources[0].jsonl, data.heldout_source.task) == ("007", {"size": 5})
    assert (data.overlong, data.max_prompt_tokens, data.chat_template) == ("skip", 100, "1e5")
    assert (
        load({"jsonl": "d"}, "--data.jsonl", "null", "--data.sources", "[{jsonl: a}, {jsonl: b}]").sources[1].jsonl
        == "b"
    )


def refused(load, data, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(data, *overrides)
    return str(caught.value).rpartition("recipe.yaml")[2].removeprefix(": ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"heldout": 3}, "no source is given; give exactly one of data.jsonl, data.parquet, data.dataset, "
         "data.reasoning_gym, or a list data.sources"),
        ({"jsonl": "a", "dataset": "b"}, "data.jsonl and data.dataset are given; give exactly one of data.jsonl"),
        ({"jsonl": "a", "sources": [JSONL]}, "data.jsonl and data.sources are both given; move data.jsonl into an ent"),
        ({"split": "a", "sources": [JSONL]}, "data.split and data.sources are both given; move data.split into an ent"),
        ({"jsonl": "a", "split": "b"}, "data.split='b' would not be used by data.jsonl; leave it out (it belongs to d"),
        ({"parquet": "a", "task": {"size": 3}}, "data.task={'size': 3} would not be used by data.parquet; leave it ou"),
        ({"reasoning_gym": "gcd", "prompt_field": "q"}, "data.prompt_field=q would never be used: a reas"),
        ({"sources": [{"weight": 2}]}, "data.sources.0: no source is given; give exactly one of jsonl, parquet, datas"),
        ({"sources": [JSONL, {"jsonl": "a", "split": "b"}]}, "data.sources.1: split='b' would not be used by jsonl; l"),
        ({"sources": [{"reasoning_gym": "gcd", "answer_field": "a"}]}, "data.sources.0: answer_field: a reasoning-gym"),
        ({"sources": [{**JSONL, "weight": 0}]}, "data.sources.0.weight=0 should be greater than 0"),
        ({"sources": [JSONL, {**JSONL, "weight": -1.5}]}, "data.sources.1.weight=-1.5 should be greater than 0"),
        ({"sources": [{**JSONL, "wieght": 2}]}, "unknown key data.sources.0.wieght; did you mean 'weight'?"),
        ({"sources": {"jsonl": "a"}}, "data.sources={'jsonl': 'a'} should be a list"),
        ({"sources": []}, "no source is given; give exactly one of data.jsonl"),
        ({"jsonl": "a", "heldout_source": {"jsnl": "b"}}, "unknown key data.heldout_source.jsnl; did you mean 'jsonl'"),
        ({"jsonl": "a", "heldout_source": {}}, "data.heldout_source: no source is given; give exactly one of jsonl"),
        ({"jsonl": "a", "heldout": 0, "heldout_source": {"jsonl": "b"}}, "data.heldout=0 would leave data.heldout_sou"),
        ({"jsonl": "a", "overlong": "cut"}, "data.overlong='cut' should be 'refuse', 'skip' or 'truncate_left'"),
        ({"jsonl": "a", "max_prompt_tokens": 0}, "data.max_prompt_tokens=0 should be greater than or equal to 1"),
        ({"jsonl": "a", "instruction": "Go"}, "data.instruction='Go' does not contain {prompt}; put it in"),
    ],
)  # fmt: skip
def test_what_a_data_section_must_not_say(load, data, message):
    assert refused(load, data).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.sources.2.weight=1", "--data.sources.2.weight: there is no entry '2' in a list of 2; write a number"),
        ("--data.sources.first.weight=1", "--data.sources.first.weight: there is no entry 'first' in a list of 2; "),
        ("--data.sources.1=7", "data.sources.1=7 should be a mapping"),
        ("--data.sources.1.weight.x=7", "data.sources.1.weight={'x': 7} should be a valid number"),
    ],
)
def test_overrides_that_lead_nowhere(load, override, message):
    assert refused(load, {"sources": [JSONL, PARQUET]}, override).startswith(message)
