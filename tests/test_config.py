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
        (LEAST + "precision: {dtype: fp16}\n", "precision.dtype='fp16' is refused: its range ends at 65504"),
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
    message = refused(load, LEAST + "grpo: {group_size: 0, clip_low: 2}\nbatch: {minibatches: 0}\n")
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


# ---- rewards


def test_a_reward_is_one_function_or_parts(load):
    assert load().reward == load(LEAST + "reward: {function: exact}\n").reward
    assert list(load().reward.all_parts) == ["exact"]
    own = load(LEAST + "reward: {function: 'my:score', options: {scale: 2}, batch: true}\n").reward.all_parts
    assert {name: part.model_dump() for name, part in own.items()} == {
        "my:score": {"function": "my:score", "weight": 1.0, "options": {"scale": 2}, "batch": True}
        | {"model": None, "per_step": False}
    }
    recipe = load(
        LEAST + "reward:\n  parts:\n    right: {function: math_verify, weight: 2}\n    tags: {function: format}\n",
        *("--reward.parts.tags.weight", "0.5", "--reward.parts.tags.options.tags", "[plan, answer]"),
        *("--reward.parts.short.function", "soft_overlong", "--reward.parts.short.options.cache=64"),
    )
    assert {name: (part.function, part.weight, part.options) for name, part in recipe.reward.all_parts.items()} == {
        "right": ("math_verify", 2.0, {"time_limit": 5.0}),  # defaults are written out
        "tags": ("format", 0.5, {"tags": ("plan", "answer"), "opened": False}),
        "short": ("soft_overlong", 1.0, {"cache": 64}),
    }
    assert load(to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("function: exakt",
         "reward.function='exakt' is neither package.module:function (my_rewards:score for score() in ./my_rewards.py) "
         "nor built in; did you mean 'exact'?"),
        ("function: pay.score", "reward.function='pay.score' is neither package.module:function"),
        ("function: ':score'", "reward.function=':score' is neither package.module:function"),
        ("function: 'pay:'", "reward.function='pay:' is neither package.module:function"),
        ("function: 3", "reward.function=3 was not read as text; put it in quotes"),
        ("options: 3", "reward.options=3 should be a mapping"),
        ("functon: exact", "unknown key reward.functon; did you mean 'function'?"),
        ("options: {time_limit: 3}", "reward.options.time_limit is no option of exact; it has none, leave it out"),
        ("batch: true", "reward.batch=true is for functions of your own; leave it out for exact"),
        ("parts: [1]", "reward.parts=[1] should be a mapping"),
        ("parts: {a: length}", "reward.parts.a='length' is no mapping; write {function: ...}"),
        ("parts: {a: {}}", "reward.parts.a says neither function nor model; write one of them"),
        ("parts: {a b: {function: exact}}", "reward.parts: 'a b' cannot name a part; use letters, digits, _ and -"),
        ("parts: {1: {function: exact}}", "reward.parts: 1 cannot name a part; "),
        ("parts: {a: {function: exact, wieght: 1}}", "unknown key reward.parts.a.wieght; did you mean 'weight'?"),
        ("parts: {a: {function: exact, weight: .nan}}", "reward.parts.a.weight=nan should be a finite number"),
        ("parts: {a: {function: exatc}}", "reward.parts.a.function='exatc' is neither package.module:function"),
        ("function: exact, parts: {a: {function: exact}}", "reward.function and reward.parts are both given; "),
        ("parts: {a: {function: regex, options: {patern: x}}}",
         "reward.parts.a.options.patern is no option of regex; did you mean 'pattern'?"),
        ("function: regex", "reward.options.pattern is missing; regex cannot do without it"),
        ("function: regex, options: {pattern: ''}", "reward.options.pattern='' should have at least 1 character"),
        ("function: regex, options: {pattern: '(a'}",
         "reward.options.pattern='(a' is no regular expression (missing ), unterminated subpattern at position 0)"),
        ("function: regex, options: {pattern: '(a)', group: 2}",
         "reward.options.group=2 is not in the pattern '(a)', which has 1 groups; put"),
        ("function: regex, options: {pattern: '(a)', group: x}", "reward.options.group='x' is not in the pattern"),
        ("function: regex, options: {pattern: a, match: whole}",
         "reward.options.match='whole' should be 'search' or 'fullmatch'"),
        ("function: format, options: {tags: []}", "reward.options.tags=[] should have at least 1 item"),
        ("function: format, options: {tags: [<a>]}", "reward.options.tags: '<a>' is no tag's name; write think for "),
        ("function: format, options: {tags: [a, a]}", "reward.options.tags=['a', 'a'] names a tag twice"),
        ("function: length, options: {shape: cubic}", "reward.options.shape='cubic' should be 'linear' or 'cosine'"),
        ("function: length, options: {start: -1}", "reward.options.start=-1 should be greater than or equal to 0"),
        ("function: soft_overlong", "reward.options.cache is missing; soft_overlong cannot do without it"),
        ("function: soft_overlong, options: {cache: 0}", "reward.options.cache=0 should be greater than or equal to 1"),
        ("function: length, options: {start: 256}",
         "reward.options.start=256 is not below end=256 and sampling.max_completion_tokens=256: the penalty would"),
        ("function: length, options: {start: 300, end: 400}", "reward.options.start=300 is not below end=400 and "),
        ("function: length, options: {start: 30, end: 30}", "reward.options.start=30 is not below end=30 and "),
        ("parts: {long: {function: soft_overlong, options: {cache: 257}}}",
         "reward.parts.long.options.cache=257 exceeds sampling.max_completion_tokens=256; lower it (DAPO"),
        ("function: math_verify, options: {time_limit: 0}", "reward.options.time_limit=0 should be greater than 0"),
        ("function: reasoning_gym, options: {strict: 1}", "reward.options.strict=1 should be a valid boolean"),
    ],
)  # fmt: skip
def test_what_a_reward_must_not_say(load, reward, message):
    assert refused(load, LEAST + f"reward: {{{reward}}}\n").startswith(message)
