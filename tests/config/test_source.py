"""`sampling.source`: the preset sft, what contradicts it, and what would never be used."""

from __future__ import annotations

import pytest

from grpo_mega import cli
from grpo_mega.config import load_recipe, validate_recipe
from grpo_mega.errors import ConfigError

LEAST = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "run": {"directory": "r"}}
NO_HELDOUT = {"data": {"jsonl": "d", "heldout": 0}}


def refused(preset="sft", **sections):
    with pytest.raises(ConfigError) as caught:
        validate_recipe(LEAST | {"preset": preset} | sections)
    return str(caught.value).removeprefix("recipe: ")


def test_the_preset_is_maximum_likelihood_on_demonstrations():
    recipe = validate_recipe(LEAST | {"preset": "sft"})
    grpo = recipe.grpo
    assert (recipe.sampling.source, grpo.group_size, grpo.advantage, grpo.surrogate) == (
        "data", 1, "best_of_n", "logprob",
    )  # fmt: skip
    assert (grpo.kl_coef, grpo.normalization, validate_recipe(LEAST).sampling.source) == (0.0, "token", "policy")
    several = {"data": {"sources": [{"jsonl": "a"}, {"reasoning_gym": "gcd", "completion_field": "answer"}]}}
    assert validate_recipe(LEAST | {"preset": "sft"} | several).data.sources[1].completion_field == "answer"


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"grpo": {"group_size": 8}}, "grpo.group_size=8 contradicts sampling.source=data: a row has one demonstration;"
         " set grpo.group_size=1, as the preset sft has it"),
        ({"grpo": {"advantage": "reinforce_plus_plus"}}, "grpo.advantage=reinforce_plus_plus contradicts sampling.sou"),
        ({"grpo": {"surrogate": "clip"}}, "grpo.surrogate=clip contradicts sampling.source=data: the policy did not d"),
        ({"grpo": {"kl_coef": 0.1}}, "grpo.kl_coef=0.1 contradicts sampling.source=data: the policy did not draw the "),
        ({"grpo": {"kl_coef": 0.1, "kl_in": "reward"}}, "grpo.kl_in=reward with grpo.advantage=best_of_n"),
        ({"grpo": {"correction": "truncate"}}, "grpo.correction=truncate contradicts sampling.source=data"),
        ({"grpo": {"off_policy_threshold": 0.1}}, "grpo.off_policy_threshold=0.1 would never be used"),
        ({"grpo": {"best_above": 0.5}}, "grpo.best_above=0.5 contradicts sampling.source=data"),
        ({"grpo": {"max_resamples": 2}}, "grpo.max_resamples=2 replaces groups of equal rewards"),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature=0.7 contradicts sampling.source=data: the likeliho"),
        ({"reward": {"function": "my:f", "steps": {}}}, "grpo.advantage=best_of_n is for one reward a completion"),
        (NO_HELDOUT | {"sampling": {"top_p": 0.9}}, "sampling.top_p=0.9 would never be used with sampling.source=data "
         "and data.heldout=0"),
        (NO_HELDOUT | {"sampling": {"pipeline": 2}}, "sampling.pipeline=2 would never be used with"),
        (NO_HELDOUT | {"reward": {"function": "my:f"}}, "reward.function=my:f would never be used with"),
        (NO_HELDOUT | {"precision": {"sampling": "bf16"}}, "precision.sampling=bf16 would never be used with"),
        (NO_HELDOUT | {"run": {"directory": "r", "evaluate_every": 2}}, "run.evaluate_every=2 would never be used wit"),
        (NO_HELDOUT | {"reward_models": {"j": {"path": "m"}}}, "reward_models=j would never be used with sampling.sou"),
        ({"reward_models": {"j": {"path": "m", "train": {"labels": "exact", "every": 1}}}}, "reward_models.j.train lear"
         "ns from the policy's completions, and sampling.source=data trains on demonstrations"),
        ({"preset": "rft", "data": {"jsonl": "d", "completion_field": "c"}}, "data.completion_field=c would never be "),
        ({"preset": None, "data": {"sources": [{"jsonl": "d", "completion_field": "c"}]}}, "data.sources.0.completion"),
        ({"preset": ["sft", "dapo"]},
         "the presets sft and dapo contradict each other: grpo.advantage=best_of_n and grpo;"),
    ],
)  # fmt: skip
def test_contradictions(sections, sentence):
    assert refused(**sections).startswith(sentence)


def test_what_only_held_out_problems_need_may_stand_beside_them():
    sections = {"sampling": {"top_p": 0.9, "pipeline": 2}, "reward": {"function": "math_verify"}}
    assert validate_recipe(LEAST | {"preset": "sft"} | sections).sampling.top_p == 0.9
    stops = {"sampling": {"stop_token_ids": [3], "max_completion_tokens": 9}}
    assert validate_recipe(LEAST | NO_HELDOUT | {"preset": "sft"} | stops).sampling.stop_token_ids == (3,)


def test_the_command_implies_the_preset_and_the_recipe_has_the_last_word(tmp_path, monkeypatch, capsys):
    file, trained = tmp_path / "recipe.yaml", []
    monkeypatch.setattr(cli, "_train", lambda recipe, ranks, arguments: trained.append((recipe, ranks)) or 0)
    file.write_text("model: {path: m}\ndata: {jsonl: d}\nrun: {directory: r}\ngrpo: {normalization: sequence}\n")
    assert cli.run(["sft", str(file), "--ranks", "2", "--data.completion_field", "gold"]) == 0
    (recipe, ranks) = trained.pop()
    assert ranks == 2 and recipe == load_recipe(file, ["--preset", "sft", "--data.completion_field", "gold"])
    assert (recipe.sampling.source, recipe.grpo.normalization, recipe.data.completion_field) == (
        "data", "sequence", "gold",
    )  # fmt: skip
    assert cli.run(["train", str(file)]) == 0 and trained.pop()[0].sampling.source == "policy"
    assert cli.run(["sft", str(file), "--preset", "sft"]) == 0 and trained.pop()[0].grpo.group_size == 1
    for words, sentence in (
        (["--preset", "dapo"], "the presets sft and dapo contradict each other"),
        (["--preset", "3"], "preset=3 is no name"),
        (["--grpo.group_size", "8"], "grpo.group_size=8 contradicts sampling.source=data"),
        (
            ["--sampling.source", "policy"],
            "grpo-mega sft trains on demonstrations, and sampling.source=policy does not",
        ),
    ):
        assert cli.run(["sft", str(file), *words]) == ConfigError.exit_code and not trained
        assert sentence in capsys.readouterr().err
