from __future__ import annotations

import pytest
from pydantic import ValidationError

from grpo_mega.config import Recipe, load_recipe, to_yaml, validate_recipe
from grpo_mega.errors import ConfigError

LEAST = """\
model: {path: weights}
data: {jsonl: train.jsonl}
run: {directory: out}
"""


@pytest.fixture
def load(tmp_path):
    """load(yaml text, *override words) -> Recipe."""

    def load(text=LEAST, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def refused(load, text, *overrides):
    """The error's sentence, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).rpartition("recipe.yaml")[2].removeprefix(": ")


def test_the_least_recipe_and_its_defaults(load):
    recipe = load()
    assert (recipe.model.path, recipe.data.jsonl, recipe.run.directory) == ("weights", "train.jsonl", "out")
    assert (recipe.grpo.group_size, recipe.grpo.kl_coef, recipe.grpo.num_iterations) == (8, 0.04, 1)
    assert recipe.reference_path == "weights"
    assert load(LEAST + "grpo:\n").grpo == recipe.grpo  # a section left empty is a section of defaults
    assert load(LEAST + "grpo:\n", "--grpo.group_size=4").grpo.group_size == 4
    with pytest.raises(ValidationError, match="frozen"):
        recipe.grpo.group_size = 4


def test_values_of_the_file(load):
    recipe = load(
        LEAST + "reference: {path: frozen}\noptimizer: {lr: 1e-6, clip_grad: 1}\nparallel: {pipeline: 2, "
        "pipeline_layout: [3, 4]}\nsampling:\n  stop_token_ids: [7]\n"
    )
    assert recipe.reference_path == "frozen"
    assert recipe.optimizer.lr == 1e-6 and recipe.optimizer.clip_grad == 1.0
    assert recipe.parallel.pipeline_layout == (3, 4) and recipe.sampling.stop_token_ids == (7,)


def test_a_section_can_be_given_anew(load):
    text = LEAST + "parallel: {pipeline: 2, pipeline_layout: [3, 4]}\n"
    parallel = load(text, "--parallel", "{tensor: 3}").parallel
    assert (parallel.tensor, parallel.pipeline, parallel.pipeline_layout) == (3, 1, None)


def test_overrides_in_both_spellings_the_last_one_wins(load):
    recipe = load(LEAST, "--grpo.group_size", "4", "--optimizer.lr=3e-5", "--grpo.group_size=16", "--run.seed", "7")
    assert (recipe.grpo.group_size, recipe.optimizer.lr, recipe.run.seed) == (16, 3e-5, 7)


def test_override_values_are_yaml(load):
    recipe = load(
        LEAST,
        *("--optimizer.lr", "1e-6", "--sampling.stop_token_ids", "[1, 2]", "--sampling.temperature", "2"),
        *("--parallel.tensor=2", "--parallel.sequence=true"),
        *("--data.jsonl", "null", "--data.reasoning_gym", "chain_sum"),
        *("--data.task.size", "50", "--data.task.weights.easy", "1e-1"),
    )
    assert recipe.optimizer.lr == 1e-6 and recipe.sampling.stop_token_ids == (1, 2)
    assert recipe.sampling.temperature == 2.0 and recipe.parallel.sequence is True
    assert recipe.data.jsonl is None and recipe.data.task == {"size": 50, "weights": {"easy": 0.1}}


def test_text_is_taken_as_it_stands(load):
    recipe = load(
        LEAST,
        *("--data.instruction={prompt}", "--data.system", "Answer: [yes, no]"),
        *("--run.directory=007", "--model.path=1e5"),
    )
    assert recipe.data.instruction == "{prompt}" and recipe.data.system == "Answer: [yes, no]"
    assert recipe.run.directory == "007" and recipe.model.path == "1e5"
    assert load(LEAST, "--data.system=").data.system == ""
    assert load(LEAST, "--data.system=null").data.system is None


def test_the_resolved_recipe_is_the_same_recipe(load):
    recipe = load(
        LEAST.replace("jsonl: train.jsonl", "reasoning_gym: gcd"),
        *("--optimizer.lr=1e-6", "--model.path=1e5", "--data.task={a: .inf, b: [1, 2e-3], c: '1e-6', d: 'null'}"),
    )
    assert load(to_yaml(recipe)) == recipe
    assert "num_iterations: 1\n" in to_yaml(recipe)  # defaults are written out
    assert recipe.data.task["c"] == "1e-6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "grpo: {grup_size: 4}\n", "unknown key grpo.grup_size; did you mean 'group_size'?"),
        (LEAST + "grop: {group_size: 4}\n", "unknown section 'grop'; did you mean 'grpo'?"),
        (LEAST + "1: {}\n", "unknown section 1; known: model, reference, "),
        ("model: {path: w}\ndata: {jsonl: d}\n", "section run is missing; write run: and its keys below it"),
        (LEAST.replace("path: weights", ""), "model.path is missing and has no default; write it in the recipe"),
        (LEAST.replace("path: weights", "path: 7"), "model.path=7 was not read as text; put it in quotes"),
        (LEAST.replace("path: weights", "path: ''"), "model.path='' should have at least 1 character"),
        (LEAST + "grpo: 3\n", "section 'grpo' holds 3; write its keys below it, indented"),
        (LEAST + "precision: {dtype: fp16}\n", "precision.dtype='fp16' is refused: it keeps 11 bits of a ratio"),
        (LEAST + "precision: {dtype: int4}\n", "precision.dtype='int4' is not supported; use "),
        (LEAST + "grpo: {group_size: 1}\n", "grpo.group_size=1 leaves nothing to compare a completion with: "),
        (LEAST + "grpo: {kl_coef: -0.5}\n", "grpo.kl_coef=-0.5 should be greater than or equal to 0"),
        (LEAST + "grpo: {kl_coef: .nan}\n", "grpo.kl_coef=nan should be a finite number"),
        (LEAST + "grpo: {normalization: mean}\n", "grpo.normalization='mean' should be 'sequence', 'group_token', "),
        (LEAST + "sampling: {stop_token_ids: 2}\n", "sampling.stop_token_ids=2 should be a list"),
        (LEAST + "sampling: {stop_token_ids: [2, -1]}\n", "sampling.stop_token_ids.1=-1 should be greater than or"),
        (LEAST.replace("out}", "out, save_every: true}"), "run.save_every=True should be a valid integer"),
        (LEAST.replace("out}", "out, num_steps: {a: 1}}"), "run.num_steps={'a': 1} should be a valid integer"),
        (LEAST.replace("jsonl: train.jsonl", ""), "no source is given; give exactly one of data.jsonl, data.parquet,"),
        (LEAST.replace("}\nrun", ", reasoning_gym: gcd}\nrun"), "data.jsonl and data.reasoning_gym are given; give"),
        (LEAST.replace("}\nrun", ", instruction: Go}\nrun"), "data.instruction='Go' does not contain {prompt}; put"),
        (
            LEAST + "parallel: {pipeline: 2, pipeline_layout: [1, 2, 3]}\n",
            "parallel.pipeline_layout has 3 stages but parallel.pipeline=2; give one layer count a stage",
        ),
        (LEAST + "parallel: {sequence: true}\n", "parallel.sequence=true needs parallel.tensor > 1; set"),
        (LEAST + "batch: {minibatches: 3}\n", "batch.prompts_per_step=8 is not divisible by batch.minibatches=3; "),
        (
            LEAST + "optimizer: {warmup_steps: 101}\n",
            "optimizer.warmup_steps=101 exceeds run.num_steps=100; warm up for fewer steps",
        ),
        (LEAST + "optimizer: {lr: 1e-6, min_lr: 1e-5}\n", "optimizer.min_lr=1e-05 exceeds optimizer.lr=1e-06; lower"),
        (LEAST + "grpo: {group_size: 65}\n", "grpo.group_size=65 exceeds sampling.max_rows=64, the rows decoded"),
        (
            LEAST + "reference: {path: frozen}\ngrpo: {kl_coef: 0}\n",
            "reference.path=frozen would never be used with grpo.kl_coef=0; leave it out",
        ),
        ("", " is empty; write its sections (model:, data:, run:, ...)"),
        ("- model\n", " holds a list; write its sections (model:, data:, run:, ...)"),
        ("model: [\n", " is not valid YAML: line 2, column 1: expected the node content"),
        (LEAST + "[1]: {}\n", " is not valid YAML: line 4, column 1: found unhashable key"),
        (LEAST + "model: {path: other}\n", " is not valid YAML: line 4, column 1: key 'model' is given twice"),
        (LEAST + "grpo:\n  eps: 0\n  eps: 1\n", " is not valid YAML: line 6, column 3: key 'eps' is given twice"),
    ],
)
def test_what_a_recipe_must_not_say(load, text, message):
    assert refused(load, text).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--grop.group_size=4"], "--grop.group_size names no recipe section; did you mean 'grpo'?"),
        (["--seed", "4"], "--seed names no recipe section; known: model, "),
        (["--run", "4"], "--run names a section; write --run.key value, or --run '{key: value}'"),
        (["--grpo.grup_size", "4"], "unknown key grpo.grup_size; did you mean 'group_size'?"),
        (["grpo.group_size=4"], "'grpo.group_size=4' is not an override; write --section.key value"),
        (["--", "4"], "'--' is not an override; write --section.key value"),
        (["--run.seed"], "--run.seed lacks a value; write --run.seed value"),
        (["--run.seed", "x"], "run.seed='x' should be a valid integer"),
        (["--data.task.size=[1"], "--data.task.size=[1: the value is not valid YAML: line 1, column 3: expected"),
        (["--data.task", "7"], "data.task=7 should be a mapping"),
        (["--data.jsonl.x", "7"], "--data.jsonl.x: 'jsonl' holds 'train.jsonl', so it has no key 'x'; drop .x"),
    ],
)
def test_what_an_override_must_not_say(load, overrides, message):
    assert refused(load, LEAST, *overrides).startswith(message)


def test_every_problem_is_told_at_once(load):
    message = refused(load, LEAST + "grpo: {group_size: 1, clip_low: 2}\nbatch: {minibatches: 0}\n")
    assert [part.split("=")[0] for part in message.split("; ") if "=" in part] == [
        "grpo.group_size",
        "grpo.clip_low",
        "batch.minibatches",
    ]


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"recipe .* cannot be read \(.*\); give the path of a YAML file"):
            load_recipe(path)
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"binary.yaml is not UTF-8 \(invalid start byte at byte 7\); save as UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_recipe_from_mappings_names_itself():
    tree = {"model": {"path": "w"}, "data": {"jsonl": "d"}, "run": {"directory": "o"}}
    assert isinstance(validate_recipe(tree), Recipe)
    with pytest.raises(ConfigError, match=r"^recipe: unknown key run.stepps; "):
        validate_recipe({**tree, "run": {"directory": "o", "stepps": 3}})
