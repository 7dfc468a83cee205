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
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from grpo_mega.config.reward import MathVerifyOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import BoundedError, bounded
from grpo_mega.rewards.exact import is_number, marked_text

MAX_CHARS = 10_000  # of the text's end; math-verify's own patterns are slower than linear

_DELIMITED = re.compile(r"\$|\\f?boxed|\\\(|\\\[")
_PROSE = re.compile(r"(?:^|\s)[A-Za-z]{2,}[,:]?(?=\s|$)")  # a word by itself: no formula as it stands

_DECIMAL = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?")
_OPERATION = re.compile(
    r"[\w)\]}](?<![0-9][eE])\s*[-+−]"  # a sign between operands, not that of 1e-5
    r"|[*×·÷^!∙√]|[\w)\]}]\s*[(\[]"  # 3(4)
    r"|\\(?![dt]?frac\b|text\b|mathrm\b|mathbf\b|left\b|right\b|[^A-Za-z])"  # \times, \sqrt, \sin, ...
)
_QUOTIENT = re.compile(r"/|\\[dt]?frac")


def math_verify(options: MathVerifyOptions) -> Callable[[str, str | None, Mapping[str, Any]], float]:
    """The reward function; it raises RewardError for a reference that is missing or is no mathematics, BoundedError
    when a comparison takes longer than `options.time_limit`."""
    ask = bounded(f"{__name__}:answered")

    def score(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
        if answer is None:
            raise RewardError("the prompt has no reference answer for math_verify; check data.answer_field")
        text = completion[-MAX_CHARS:]
        if not text.strip():
            return 0.0
        return float(ask(options.time_limit, "equal", reference_of(answer), text))

    return score


def reference_of(answer: str) -> str:
    """What of a reference is compared: of a worked solution what follows its last "####" (GSM8K), or what its last
    \\boxed{...} holds (MATH)."""
    reference = answer.rpartition("####")[2].strip()
    return (marked_text(reference, clauses=False).strip() if "boxed" in reference else "") or reference


def votes(options: MathVerifyOptions, completions: Sequence[str]) -> list[str | None]:
    """The answer of each completion, in the words of the first one that has an equal answer; None without an answer, or
    one that takes too long.

    Equal means equal as mathematics: each new answer is compared with the first of every class so far, so that there
    are at most as many comparisons as pairs of different texts. Two plain decimals are compared here, the rest as the
    reward compares; what cannot be compared in time is not equal.
    """
    ask = bounded(f"{__name__}:answered")
    known: dict[str, str] = {}  # an answer as written -> the first of its class
    result: list[str | None] = []
    for completion in completions:
        try:
            text = ask(options.time_limit, "written", completion[-MAX_CHARS:]) if completion.strip() else ""
        except BoundedError:
            text = ""
        if text and text not in known:
            firsts = dict.fromkeys(known.values())
            known[text] = next((first for first in firsts if _same(first, text, ask, options.time_limit)), text)
        result.append(known.get(text))
    return result


def _same(one: str, other: str, ask: Callable[..., Any], time_limit: float) -> bool:
    if _DECIMAL.fullmatch(one) and _DECIMAL.fullmatch(other):
        return Decimal(one) == Decimal(other)
    try:
        return bool(ask(time_limit, "same", one, other))
    except BoundedError:
        return False


def answered(question: str, *texts: str) -> bool | str:
    """One process for all questions: `equal`, `written` or `same`. To be called under a time limit."""
    questions: dict[str, Callable[..., bool | str]] = {"equal": equal, "written": written, "same": same}
    return questions[question](*texts)


def equal(reference: str, text: str) -> bool:
    """Whether the answer that `text` commits to equals `reference`. To be called under a time limit."""
    from math_verify import parse, verify

    gold = parse(_formula(reference), parsing_timeout=None)
    if not any(not isinstance(reading, str) for reading in gold):
        raise RewardError(f"the reference answer {reference[:80]!r} is no mathematics that can be read")
    found, text = _read(text)
    if is_number(reference) and not _carried_out(text, reference):
        return False
    return verify(gold, found, timeout_seconds=None)


def written(text: str) -> str:
    """The one answer that `text` commits to, as it is written; "" if there is none. To be called under a time limit."""
    return _read(text)[1].strip() or marked_text(text).strip()


def same(one: str, other: str) -> bool:
    """Whether two answers are equal, either being the reference (3 and x = 3). To be called under a time limit."""
    from math_verify import parse, verify

    readings = [parse(_formula(text), parsing_timeout=None) for text in (one, other)]
    return any(verify(*pair, timeout_seconds=None) for pair in (readings, readings[::-1]))


def _read(text: str) -> tuple[list[Any], str]:
    """math-verify's readings of the answer that `text` commits to, and the text that they are of ("": nothing)."""
    from math_verify import parse

    marked = marked_text(text).strip()
    found = parse(_formula(marked) if marked else text, parsing_timeout=None)
    return found, next((reading for reading in found if isinstance(reading, str)), "")


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
