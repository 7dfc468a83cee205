"""The `math_verify` reward: 1.0 if the answer equals the reference as mathematics (sympy, by the library math-verify).

\\frac{1}{2} = 0.5, x^2+1 = 1+x^2, \\{2,1\\} = \\{1,2\\}. The one answer that is compared is what the last marker holds
(`exact` has the rules: \\boxed{...}, <answer>...</answer>, "answer is ..."); without one, math-verify's choice of the
text's last formula or number, which makes a set of several formulas or boxes, so that listing candidates pays nothing.

sympy may take for ever over one expression, and math-verify's own limit is an alarm signal, which a thread cannot set
and a long operation in C does not see: the comparison runs under `rewards/bounded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from grpo_mega.config.reward import MathVerifyOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import bounded
from grpo_mega.rewards.exact import marked_text

MAX_CHARS = 10_000  # of the text's end; math-verify's own patterns are slower than linear

_DELIMITED = re.compile(r"\$|\\f?boxed|\\\(|\\\[")
_PROSE = re.compile(r"(?:^|\s)[A-Za-z]{2,}[,:]?(?=\s|$)")  # a word by itself: no formula as it stands


def math_verify(options: MathVerifyOptions) -> Callable[[str, str | None, Mapping[str, Any]], float]:
    """The reward function; it raises RewardError for a reference that is missing or is no mathematics, BoundedError
    when a comparison takes longer than `options.time_limit`."""
    compare = bounded(f"{__name__}:equal")

    def score(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
        if answer is None:
            raise RewardError("the prompt has no reference answer for math_verify; check data.answer_field")
        text = completion[-MAX_CHARS:]
        if not text.strip():
            return 0.0
        return float(compare(options.time_limit, answer.rpartition("####")[2].strip(), text))

    return score


def equal(reference: str, text: str) -> bool:
    """Whether the answer that `text` commits to equals `reference`. To be called under a time limit."""
    from math_verify import parse, verify

    gold = parse(_formula(reference), parsing_timeout=None)
    if not any(not isinstance(reading, str) for reading in gold):
        raise RewardError(f"the reference answer {reference[:80]!r} is no mathematics that can be read")
    marked = marked_text(text).strip()
    found = parse(_formula(marked) if marked else text, parsing_timeout=None)
    return verify(gold, found, timeout_seconds=None)


def prepare() -> None:
    """Imports and first-use tables (0.5 s), before any time limit runs."""
    equal("1", "1")


def _formula(text: str) -> str:
    """An answer as something that math-verify takes for one formula; prose as it stands."""
    if _DELIMITED.search(text) or _PROSE.search(text):
        return text
    return f"\\boxed{{{text}}}"
