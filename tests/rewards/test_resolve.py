from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo_mega.config.reward import OPTIONS, RewardConfig
from grpo_mega.errors import DataError, RewardError
from grpo_mega.rewards.exact import exact
from grpo_mega.rewards.resolve import BUILT_IN, Part, check_row, resolve_reward

MODULE = """
from functools import partial
WEIGHT = 2
def score(text, answer, row): return 0.5
def two(text, answer): return 0.0
def four(text, answer, row, extra): return 0.0
def keyword(text, answer, *, row): return 0.0
def optional(text, answer, row, extra=1, *more, **named): return 0.25
def anything(*arguments): return 0.75
halved = partial(four, extra=1)
async def later(text, answer, row): return 1.0
def scaled(text, answer, row, *, scale, offset=0.0): return scale * len(text) + offset
def tokens(text, answer, row, *, token_ids): return float(len(token_ids))
def ended(text, answer, row, *, finish_reason, token_ids, scale): return scale * (finish_reason == "stop")
def all_of_them(texts, answers, rows): return [0.5] * len(texts)
class Judge:
    def __call__(self, text, answer, row): return 1.0
judge = Judge()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A current directory with `pay.py` in it, which is not on sys.path yet; both are undone."""
    (tmp_path / "pay.py").write_text(MODULE)
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('usage: exits')")
    (tmp_path / "broken.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def resolve(function: str, **more) -> Part:
    (part,) = resolve_reward(RewardConfig(function=function, **more), 100)
    return part


def test_built_in():
    assert resolve("exact") == Part("exact", 1.0, exact)
    assert set(BUILT_IN) == set(OPTIONS)


def test_parts_keep_their_order_names_and_weights(here: Path):
    config = RewardConfig(
        parts={
            "right": {"function": "exact", "weight": 2.0},
            "short": {"function": "length", "weight": 0.5, "options": {"start": 10, "end": 30}},
            "judged": {"function": "pay:all_of_them", "batch": True},
            "scaled": {"function": "pay:scaled", "weight": 0.0, "options": {"scale": 3}},
        }
    )
    parts = resolve_reward(config, 100)
    assert [(part.name, part.weight, part.batch, part.extras) for part in parts] == [
        ("right", 2.0, False, ()),
        ("short", 0.5, False, ("token_ids",)),
        ("judged", 1.0, True, ()),
        ("scaled", 0.0, False, ()),
    ]
    assert parts[1].function("", None, {}, token_ids=range(20)) == -0.5
    assert parts[2].function(["a", "b"], [None, None], [{}, {}]) == [0.5, 0.5]
    assert parts[3].function("ab", None, {}) == 6.0


def test_lengths_know_the_longest_completion():
    (part,) = resolve_reward(RewardConfig(function="soft_overlong", options={"cache": 20}), 100)
    assert [part.function("", None, {}, token_ids=range(n)) for n in (80, 90, 100)] == [0.0, -0.5, -1.0]


def test_keywords_that_are_asked_for(here: Path):
    assert resolve("pay:tokens").extras == ("token_ids",)
    ended = resolve("pay:ended", options={"scale": 4})
    assert ended.extras == ("token_ids", "finish_reason")
    assert ended.function("", None, {}, token_ids=(1,), finish_reason="stop") == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("score", 0.5), ("optional", 0.25), ("anything", 0.75), ("halved", 0.0), ("judge", 1.0)],
)
def test_imported_from_the_current_directory(here: Path, name: str, value: float):
    resolve(f"pay:{name}")
    assert resolve(f"pay:{name}").function("text", None, {}) == value
    assert sys.path.count(str(here)) == 1


def test_a_function_without_a_signature_is_taken_as_it_is():
    assert resolve("builtins:max").function is max


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing:score", "missing does not import .ModuleNotFoundError: No module named 'missing'"),
        ("broken:score", "broken does not import .ModuleNotFoundError: No module named 'no_such_library'"),
        ("exits:score", "exits does not import .SystemExit: usage: exits"),
        ("..:score", r"\.\. does not import"),
        ("pay:scor", "module pay has no 'scor'; did you mean 'score'"),
        ("pay:zzzzzz", "module pay has no 'zzzzzz'; define zzzzzz.text, answer, row. there"),
        ("pay:WEIGHT", "of type int, which cannot be called"),
        ("pay:two", r"signature \(text, answer\) \(too many positional arguments\)"),
        ("pay:four", r"signature \(text, answer, row, extra\) \(missing a required argument: 'extra'\)"),
        ("pay:later", "is an async function, which returns no number; call asyncio.run in a plain one"),
        ("pay:keyword", r"signature \(text, answer, \*, row\) \("),
    ],
)
def test_refused(here: Path, name: str, message: str):
    with pytest.raises(RewardError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "scaled",
            {},
            r"signature \(text, answer, row, \*, scale, offset=0\.0\) "
            r"\(missing a required (keyword-only )?argument: 'scale'",  # Python 3.12 says keyword-only
        ),
        (
            "scaled",
            {"options": {"scale": 1, "scal": 2}},
            r"got an unexpected keyword argument 'scal'\), .*\(scale, scal\)$",
        ),
        ("score", {"options": {"scale": 1}}, "got an unexpected keyword argument 'scale'"),
        (
            "tokens",
            {"options": {"token_ids": 1}},
            "gets token_ids of each completion; give the option token_ids another",
        ),
        (
            "two",
            {"batch": True},
            "called with three positional arguments: lists of the completions' texts, their answers",
        ),
        ("zzzzzz", {"batch": True}, "define zzzzzz.texts, answers, rows. there"),
    ],
)
def test_refused_with_options_or_in_a_batch(here: Path, name: str, more: dict, message: str):
    with pytest.raises(RewardError, match=rf"^reward\.parts\.mine\.function='pay:{name}'.*{message}"):
        resolve_reward(RewardConfig(parts={"mine": {"function": f"pay:{name}", **more}}), 100)


def test_rows_must_hold_what_is_compared_with():
    regex = {"function": "regex", "options": {"pattern": "(.*)"}}
    grouped = {"function": "regex", "options": {"pattern": "(.*)", "group": 1}}
    for reward in ({"function": "format"}, {"function": "my:own"}, regex):
        check_row(RewardConfig(**reward), "d:1", None, {})
    for reward in ({"function": "exact"}, {"function": "math_verify"}, grouped):
        check_row(RewardConfig(**reward), "d:1", "12", {})
        with pytest.raises(
            DataError, match=rf"^d:1 has no answer, which reward\.function={reward['function']} compares"
        ):
            check_row(RewardConfig(**reward), "d:1", None, {})
    tasks = RewardConfig(parts={"length": {"function": "length"}, "task": {"function": "reasoning_gym"}})
    check_row(tasks, "gcd[3]", None, {"metadata": {"source_dataset": "gcd"}})
    with pytest.raises(DataError, match=r"^gcd\[3\]: there is no metadata\.source_dataset"):
        check_row(tasks, "gcd[3]", "12", {"prompt": "p"})


def test_options_of_a_task_that_is_not_there():
    config = RewardConfig(function="reasoning_gym", options={"tasks": {"gdc": {}}})
    with pytest.raises(RewardError, match=r"^reward\.options: 'gdc' is no task of reasoning-gym; did you mean 'gcd'"):
        resolve_reward(config, 100)
