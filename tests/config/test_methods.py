"""Presets and the `grpo` section: what is combined, and what is refused with which sentence."""

from __future__ import annotations

import pytest

from grpo_mega.config import load_recipe, validate_recipe
from grpo_mega.config.presets import names
from grpo_mega.errors import ConfigError
from grpo_mega.trainer.objective import terms_of

LEAST = {"model": {"path": "m"}, "data": {"jsonl": "d"}, "run": {"directory": "r"}}


def refused(**sections):
    with pytest.raises(ConfigError) as caught:
        validate_recipe(LEAST | sections)
    return str(caught.value).removeprefix("recipe: ")


@pytest.mark.parametrize("name", names())
def test_every_preset_is_a_recipe_and_changes_something(name):
    recipe = validate_recipe(LEAST | {"preset": name})
    plain = validate_recipe(LEAST)
    assert (recipe == plain) == (name == "grpo")


def test_presets_by_their_papers():
    def grpo(name):
        return validate_recipe(LEAST | {"preset": name}).grpo

    assert terms_of(grpo("grpo"), 0.0) == terms_of(validate_recipe(LEAST).grpo, 0.0)
    assert (grpo("dapo").clip_low, grpo("dapo").clip_high, grpo("dapo").normalization) == (0.2, 0.28, "group_token")
    assert (grpo("dr_grpo").advantage, grpo("dr_grpo").normalization) == ("dr_grpo", "constant")
    assert (grpo("gspo").ratio, grpo("gspo").clip_low, grpo("gspo").clip_high) == ("sequence", 3e-4, 4e-4)
    assert (grpo("cispo").surrogate, grpo("cispo").clip_low) == ("cispo", 1.0)
    assert terms_of(grpo("rloo"), 0.0).kl_coef == 0.0 and grpo("rloo").kl_in == "reward"


def test_presets_combine_and_the_recipe_has_the_last_word(tmp_path):
    sections = LEAST | {"preset": ["gspo", "icepop"], "grpo": {"clip_high": 0.01}}
    grpo = validate_recipe(sections).grpo
    assert (grpo.ratio, grpo.clip_low, grpo.clip_high, grpo.correction) == ("sequence", 3e-4, 0.01, "mask")
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: dapo\nmodel: {path: m}\ndata: {jsonl: d}\nrun: {directory: r}\n")
    assert load_recipe(file).reward.truncated == "mask"
    assert load_recipe(file, ["--grpo.clip_high", "0.3", "--reward.truncated", "reward"]).grpo.clip_high == 0.3
    assert load_recipe(file, ["--preset", "[gspo, tis]"]).grpo.correction == "truncate"


def test_presets_that_cannot_be():
    assert refused(preset=["dapo", "gspo"]) == (
        "the presets dapo and gspo contradict each other: grpo.clip_low=0.2 and 0.0003; choose one of them, and write "
        "the other's keys that you want in the recipe"
    )
    assert refused(preset="dapa") == "preset='dapa' is unknown; did you mean 'dapo'?"
    assert refused(preset=3) == "preset=3 is no name; write preset: dapo, or a list of names"


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"grpo": {"old_logprobs": "none", "num_iterations": 2}},
            "grpo.num_iterations=2 x batch.minibatches=1 updates a",
        ),
        (
            {"grpo": {"old_logprobs": "none"}, "batch": {"minibatches": 2}},
            "grpo.num_iterations=1 x batch.minibatches=2",
        ),
        ({"grpo": {"old_logprobs": "sampler", "correction": "mask"}}, "grpo.correction=mask weighs what lies between"),
        ({"grpo": {"kl_estimator": "k1"}}, "grpo.kl_estimator=k1 in the loss penalises nothing"),
        (
            {"data": {"jsonl": "d", "heldout": 0}, "run": {"directory": "r", "evaluate_every": 2}},
            "run.evaluate_every=2 would never be used with data.heldout=0",
        ),
        ({"reference": {"enabled": False}}, "grpo.kl_coef=0.04 needs the reference that reference.enabled=false turns"),
        (
            {"grpo": {"kl_coef": 0.0}, "reference": {"refresh_every": 3}},
            "reference.refresh_every=3 would never be used",
        ),
        ({"grpo": {"kl_coef": 0.0, "kl_in": "reward"}}, "grpo.kl_in=reward would never be used: it needs grpo.kl_coef"),
        ({"grpo": {"surrogate": "sapo", "clip_high": 0.3}}, "grpo.clip_high=0.3 would never be used"),
        ({"grpo": {"surrogate": "logprob", "ratio": "sequence"}}, "grpo.ratio=sequence would never be used"),
        ({"grpo": {"correction_level": "sequence"}}, "grpo.correction_level=sequence would never be used"),
        ({"grpo": {"best": 2}}, "grpo.best=2 would never be used: it needs grpo.advantage=best_of_n"),
        ({"grpo": {"advantage": "best_of_n", "best": 9}}, "grpo.best=9 exceeds grpo.group_size=8"),
        ({"grpo": {"correction": "mask", "correction_low": 2.0}}, "grpo.correction_low=2.0 is not below"),
        ({"grpo": {"group_size": 1, "advantage": "rloo"}}, "grpo.group_size=1 leaves nothing to compare"),
        ({"reward": {"parts": {"p": {"function": "my:f", "per_step": True}}}}, "reward.parts.p.per_step=true scores"),
        ({"reward": {"parts": {"p": {"function": "my:f"}}, "steps": {}}}, "reward.steps={'delimiter': '\\n\\n'} marks"),
        ({"reward": {"truncation_reward": -1.0}}, "reward.truncation_reward=-1.0 would never be paid"),
        ({"reward": {"steps": {}}}, "reward.function=exact scores whole completions"),
        (
            {"reward": {"function": "my:f", "steps": {}}, "grpo": {"advantage": "rloo"}},
            "grpo.advantage=rloo is for one",
        ),
        (
            {"reward": {"function": "my:f", "steps": {}}, "grpo": {"ratio": "sequence"}},
            "grpo.ratio=sequence is for one",
        ),
        (
            {"reward": {"function": "my:f", "steps": {}}, "grpo": {"kl_in": "reward", "advantage": "dr_grpo"}},
            "grpo.kl_in=reward is for one",
        ),
        ({"grpo": {"kl_in": "reward"}}, "grpo.kl_in=reward with grpo.advantage=grpo: in a group of equal rewards"),
        ({"preset": "rloo", "grpo": {"num_iterations": 2}}, "grpo.surrogate=logprob compares with no old log-probs"),
        ({"preset": "rloo", "reward": {"truncated": "mask"}}, "reward.truncated=mask with grpo.kl_in=reward"),
        ({"grpo": {"max_resamples": 2, "advantage": "best_of_n", "kl_coef": 0.0}}, "grpo.max_resamples=2 replaces"),
        ({"preset": "rft", "grpo": {"off_policy_threshold": 0.1}}, "grpo.off_policy_threshold=0.1 would never be used"),
        (
            {"moe": {"routing_replay": True}, "grpo": {"num_iterations": 2, "old_logprobs": "sampler"}},
            "moe.routing_replay=true replays the pass for the old log-probs",
        ),
    ],
)
def test_contradictions(sections, sentence):
    assert refused(**sections).startswith(sentence)


def test_a_group_of_one_where_nothing_is_compared():
    for advantage in ("best_of_n", "reinforce_plus_plus"):
        assert validate_recipe(LEAST | {"grpo": {"group_size": 1, "advantage": advantage}}).grpo.group_size == 1
