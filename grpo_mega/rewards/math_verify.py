"""The `math_verify` reward: 1.0 if the answer equals the reference as mathematics (sympy, by the library math-verify).

\\frac{1}{2} = 0.5, x^2+1 = 1+x^2, \\{2,1\\} = \\{1,2\\}. The one answer that is compared is what the last marker holds
(`exact` has the rules: \\boxed{...}, <answer>...</answer>, "answer is ..."); without one, math-verify's choice of the
text's last formula or number, which makes a set of several formulas or boxes, so that listing candidates pays nothing.

9 + 1 equals 10, so that a policy could be paid for repeating the question. Where the reference is a number, the answer
must be carried out: no sum, product, power, root or function, and no quotient if the reference is whole. Where it is a
formula nothing of the kind can be asked: "Simplify x + x" is answered by x + x. Use another reward for such questions.

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
from grpo_mega.rewards.exact import is_number, marked_text

MAX_CHARS = 10_000  # of the text's end; math-verify's own patterns are slower than linear

_DELIMITED = re.compile(r"\$|\\f?boxed|\\\(|\\\[")
_PROSE = re.compile(r"(?:^|\s)[A-Za-z]{2,}[,:]?(?=\s|$)")  # a word by itself: no formula as it stands

_OPERATION = re.compile(
    r"[\w)\]}](?<![0-9][eE])\s*[-+−]"  # a sign between operands, not that of 1e-5
    r"|[*×·÷^!∙√]|[\w)\]}]\s*[(\[]"  # 3(4)
    r"|\\(?![dt]?frac\b|text\b|mathrm\b|mathbf\b|left\b|right\b|[^A-Za-z])"  # \times, \sqrt, \sin, ...
)
_QUOTIENT = re.compile(r"/|\\[dt]?frac")


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
    written = next((reading for reading in found if isinstance(reading, str)), "")
    if is_number(reference) and not _carried_out(written, reference):
        return False
    return verify(gold, found, timeout_seconds=None)


def prepare() -> None:
    """Imports and first-use tables (0.5 s), before any time limit runs."""
    equal("1", "1")


def _carried_out(written: str, reference: str) -> bool:
    """Whether an answer to a number is one, not a calculation of it. Of 9 + 1 = 10 the right side is the answer."""
    result = written.rpartition("=")[2]
    whole = "/" not in reference and "." not in reference
    return not (_OPERATION.search(result) or (whole and _QUOTIENT.search(result)))


def _formula(text: str) -> str:
    """An answer as something that math-verify takes for one formula; prose as it stands."""
    if _DELIMITED.search(text) or _PROSE.search(text):
        return text
    return f"\\boxed{{{text}}}"
