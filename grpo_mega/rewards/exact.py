"""The `exact` reward: 1.0 if the one answer that a completion commits to equals the reference answer, else 0.0.

A reward that looks for the reference anywhere in the text pays a policy for listing candidates. Here the text is read
without knowing the reference (but for whether it is a number), and exactly one answer is taken from it, so that naming
more of them never pays more than naming the last one. The rules, where a choice had to be made:

- Marked answers come first: \\boxed{...}, <answer>...</answer>, "answer is ...", "Answer: ..." (to the end of the line
  or sentence) and a line's "#### 12". Of several, the one that begins last; if it holds no answer, the next rule.
- A number: the last one. "10, 11, 12" commits to 12, and so does "11 or 12": a list is worth its last entry.
- Words: the last line that is not blank, compared without case, spacing and punctuation around it.
- Numbers are compared exactly, as decimals: 12.0 = 12 = 1.2e1, 1,200 = 1200; but a quotient is no number: 6/8 equals
  only 6/8, or a policy would be paid for repeating the question. Units after a number ("12%", "12 cm") are not read.
- ASCII digits only. Of a longer text the last 100,000 characters are read; every step is linear in their number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from grpo_mega.errors import RewardError

MAX_CHARS = 100_000

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?!\d)"  # \d: no ASCII prefix of a number in another script's digits
_NUMBER_TEXT = (
    r"(?:(?<![A-Za-z0-9_)\]}])[-+−])?"  # a sign, unless an operand stands before it: 10-12 ends in 12
    r"(?:\\?\$)?"
    rf"(?:(?<![A-Za-z_\d])(?<!\d\.){_DIGITS}(?:\.[0-9]+)?|(?<![A-Za-z_\d.])\.[0-9]+)"  # not in a name (x1) or 1.2.3
    r"(?:[eE][-+]?[0-9]+)?"
    r"(?:/[0-9]+(?:\.[0-9]+)?)*"  # swallowed whole, so that no part of 3/4 or 2026/11/05 is taken for a number
)
_NUMBER = re.compile(_NUMBER_TEXT)
_BRACES = re.compile(r"\\f?boxed\s*\{|[{}]")
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_END_OF_TAG = re.compile(r"</answer|\Z", re.IGNORECASE)
_CLAUSE = re.compile(r"(?<![A-Za-z])answer[\s*_]*(?:is\b|[:=])[\s:*_]*(?=\S)", re.IGNORECASE)
_END_OF_CLAUSE = re.compile(r"\n|[.!?](?=\s|\Z)|</answer|\Z", re.IGNORECASE)
_HASHES = re.compile(rf"####[ \t]*({_NUMBER_TEXT})[ \t\r.]*$", re.MULTILINE)  # GSM8K's; elsewhere #### is a heading
_LATEX = (
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
)
_AROUND_WORDS = " .,;:!?\"'`*$“”‘’"  # not brackets, signs or #: [1, 2] is not (1, 2), nor C++ C
_CHOICE = re.compile(r"\((\w)\)")


def exact(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
    """1.0 if `extract_answer(completion)` equals `answer`, else 0.0; no completion makes it raise. `row` is not read.

    Of a reference that holds "####" (GSM8K's worked solutions) only what follows it counts.
    Raises RewardError when there is no reference answer at all: nothing could ever be paid.
    """
    if answer is None:
        raise RewardError("the prompt has no reference answer for reward.function=exact; check data.answer_field")
    reference = answer.rpartition("####")[2].strip()
    numeric = is_number(reference)
    found = extract_answer(completion, numeric=numeric)
    if found is None:
        return 0.0
    if not numeric:
        return float(found == _plain_words(reference))
    value = _value(found)
    return float(value is not None and value == _value(_plain_number(reference)))


def vote(completion: str, answer: str | None, row: Mapping[str, Any]) -> tuple[Hashable, str] | None:
    """What a completion's answer is equal to others by (numbers by value, words as they are normalised), and the answer
    as text; None if there is none. Of the reference only its kind is read. `row` is not read."""
    numeric = answer is not None and is_number(answer.rpartition("####")[2])
    found = extract_answer(completion, numeric=numeric)
    if found is None:
        return None
    return ((_value(found) if numeric else None) or found), found


def extract_answer(text: str, *, numeric: bool = True) -> str | None:
    """The one answer that `text` commits to (see the module), None if there is none.

    numeric: a number as written, without separators and currency ("1,200.50" -> "1200.50"); else normalised words.
    """
    text = text[-MAX_CHARS:]
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    marked = marked_text(text)
    if numeric:
        number = _last(_NUMBER, marked) or _last(_NUMBER, text)
        return _plain_number(number[0]) if number else None
    lines = [line for line in text.splitlines() if _plain_words(line)]
    return _plain_words(marked) or (_plain_words(lines[-1]) if lines else None)


def is_number(reference: str) -> bool:
    """Whether a reference answer is read as a number: "12", "$1,200.50", "3/4"."""
    return _NUMBER.fullmatch(reference.strip()) is not None


def marked_text(text: str, *, clauses: bool = True) -> str:
    """What the marker that begins last holds, as written, within the last MAX_CHARS; "" without a marker.

    clauses: whether "answer is ..." and "#### 12", which end with their line, are markers too.
    """
    text = text[-MAX_CHARS:]
    found = [_last_boxed(text)]
    if clauses and (hashes := _last(_HASHES, text)):
        found.append((hashes.start(1), hashes[1]))
    for marker, end in ((_TAG, _END_OF_TAG), (_CLAUSE, _END_OF_CLAUSE))[: 1 + clauses]:
        if match := _last(marker, text):
            stop = end.search(text, match.end())
            found.append((match.end(), text[match.end() : stop.start() if stop else None]))
    return max(found)[1]


def _last_boxed(text: str) -> tuple[int, str]:
    """Start and content of the \\boxed{...} that begins last, braces balanced; (-1, "") if there is none."""
    best, opened = (-1, ""), []
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) > best[0]:
            best = (start, text[start : brace.start()])
    return best


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    match = None
    for match in pattern.finditer(text):  # noqa: B007
        pass
    return match


def _plain_number(number: str) -> str:
    return re.sub(r"[,$\\+]", "", number).replace("−", "-")


def _value(number: str) -> tuple[Decimal, ...] | None:
    """A plain number's exact value, a quotient's terms one by one; None beyond decimal's exponents (1e18)."""
    try:
        return tuple(Decimal(term) for term in number.split("/"))
    except InvalidOperation:
        return None


def _plain_words(text: str) -> str:
    words = " ".join(text.split()).casefold().strip(_AROUND_WORDS)
    choice = _CHOICE.fullmatch(words)
    return choice[1] if choice else words
