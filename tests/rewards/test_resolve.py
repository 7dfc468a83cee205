from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo_mega.errors import RewardError
from grpo_mega.rewards.exact import exact
from grpo_mega.rewards.resolve import resolve_reward

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


def test_built_in():
    assert resolve_reward("exact") is exact


@pytest.mark.parametrize(
    ("name", "value"),
    [("score", 0.5), ("optional", 0.25), ("anything", 0.75), ("halved", 0.0), ("judge", 1.0)],
)
def test_imported_from_the_current_directory(here: Path, name: str, value: float):
    resolve_reward(f"pay:{name}")
    assert resolve_reward(f"pay:{name}")("text", None, {}) == value
    assert sys.path.count(str(here)) == 1


def test_a_function_without_a_signature_is_taken_as_it_is():
    assert resolve_reward("builtins:max") is max


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", r"'exakt' is neither built in \(exact\) nor of the form package.module:function"),
        ("pay.score", "nor of the form"),
        (":score", "nor of the form"),
        ("pay:", "nor of the form"),
        ("", "nor of the form"),
        ("missing:score", "missing does not import .ModuleNotFoundError: No module named 'missing'"),
        ("broken:score", "broken does not import .ModuleNotFoundError: No module named 'no_such_library'"),
        ("exits:score", "exits does not import .SystemExit: usage: exits"),
        ("..:score", r"\.\. does not import"),
        ("pay:scor", "module pay has no 'scor'; did you mean 'score'"),
        ("pay:zzzzzz", "module pay has no 'zzzzzz'; define zzzzzz.text, answer, row. there"),
        ("pay:WEIGHT", "of type int, which cannot be called"),
        ("pay:two", r"signature \(text, answer\) \(too many positional arguments\)"),
        ("pay:four", r"signature \(text, answer, row, extra\) \(missing a required argument: 'extra'\)"),
        ("pay:keyword", r"signature \(text, answer, \*, row\) \("),
    ],
)
def test_refused(here: Path, name: str, message: str):
    with pytest.raises(RewardError, match=message):
        resolve_reward(name)
