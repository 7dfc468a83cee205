"""Tables of texts: what one answer each commits to, and what it is paid."""

from __future__ import annotations

import time

import pytest

from grpo_mega.errors import RewardError
from grpo_mega.rewards.exact import MAX_CHARS, exact, extract_answer

NUMBERS = [
    # the last number, read with care
    ("12", "12"),
    ("7 + 5 = 12.", "12"),
    ("7 + 5 = 12.\n", "12"),
    ("The total is 1,234,567.89 dollars.", "1234567.89"),
    ("It costs $1,200.", "1200"),
    (r"It costs \$3.50", "3.50"),
    ("a loss of -$5", "-5"),
    ("x = -5", "-5"),
    ("x=−5", "-5"),  # U+2212
    ("+5", "5"),
    (".5", ".5"),
    ("so 10-12", "12"),  # an operand stands before it: no sign
    ("(3)-4", "4"),
    ("7 - 12", "12"),
    ("5 -12", "-12"),
    ("**12**", "12"),
    ("That is 12cm, or 50%.", "50"),
    ("12 molecules of H2O", "12"),  # not in a name
    ("12 = x_3", "12"),
    ("section 3.14.15", "3.14"),
    ("Well...12", "12"),
    ("答案是12。", "12"),
    ("1.5e3 m", "1.5e3"),
    ("no number here", None),
    ("", None),
    ("  \n\t ", None),
    # a list is worth its last entry, with or without spaces
    ("10, 11, 12", "12"),
    ("10,11,12", "12"),
    ("11 or 12", "12"),
    ("1 2 3 4 5 6 7 8 9 10 11 12 13", "13"),
    ("1,2000", "2000"),
    # a quotient or a date is swallowed whole
    ("6/8 = 3/4", "3/4"),
    ("on 2026/11/05", "2026/11/05"),
    # marked answers come first
    (r"\boxed{12} after 3 steps", "12"),
    (r"$\boxed{\text{12}}$, 3", "12"),
    (r"\boxed{-\frac{1}{2}} 7", "-1/2"),
    (r"\boxed{1{,}200} 7", "1200"),
    (r"first \boxed{1}, no: \boxed{2}, since 3", "2"),
    (r"\boxed{x_{12} = 5} 7", "5"),
    (r"\boxed{\boxed{12} 5} 7", "12"),
    (r"\boxed{12 was cut", "12"),
    (r"} \boxed{12}} {7", "12"),
    ("She has 5 left.\n#### 72\n(checked 3 times)", "72"),
    ("#### 1,200.\r\nstep 7", "1200"),
    ("#### Step 3: add\nwe get 12", "12"),  # a heading, not GSM8K's marker
    ("#### 2. Add\nwe get 12", "12"),
    ("The answer is 12. I checked 3 times.", "12"),
    ("The answer is: **12**\n\nStep 3 was hard.", "12"),
    ("**Answer:** 12 (of 20 tries)", "20"),
    ("Answer = 7 + 5 = 12\n3", "12"),
    ("ANSWER:\n\n12\n\n3", "12"),
    ("The answer is 12.\nI hope the answer is helpful.", "12"),
    ("We get 12.\nAnswer:", "12"),
    ("<answer>12</answer> 3", "12"),
    ("<ANSWER>\n 12\n</ANSWER>\n3", "12"),
    ("3 <answer>12", "12"),
    ("<answer>The answer is 12</answer> 3", "12"),
    (r"Answer: \boxed{12} or 3", "12"),
    (r"\boxed{unknown} 12", "12"),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_extracted_number(text: str, expected: str | None):
    assert extract_answer(text) == expected


WORDS = [
    ("I think.\n\nRed.\n\n", "red"),
    ('It is "Red"!', 'it is "red'),  # the whole last line, or nothing
    ("The answer is Red. Is it not?", "red"),
    ("Answer: **dark   red**", "dark red"),
    (r"\boxed{\text{Red}}", "red"),
    ("<answer>\na b\nc d\n</answer> bye", "a b c d"),
    ("The answer is (B).", "b"),
    ("[1, 2]", "[1, 2]"),
    ("C++", "c++"),
    ("red\n***\n...", "red"),
    ("", None),
    ("\n.\n", None),
]


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_extracted_words(text: str, expected: str | None):
    assert extract_answer(text, numeric=False) == expected


PAID = [
    ("12.0", "12"),
    ("012", "12"),
    ("1.2e1", "12"),
    ("1200", "1,200"),
    ("1,200", "1200"),
    ("$12", "12"),
    ("-0", "0"),
    ("0.30", ".3"),
    ("it is 3/4", "3/4"),
    ("100000000000000000000000000000000000001", "100000000000000000000000000000000000001"),
    ("1e999999999", "1e999999999"),
    ("12", " 12\n"),
    ("12", "Natalia sold 7 + 5 = <<7+5=12>>12 clips.\n#### 12"),
    ("The answer is BLUE.", " blue"),
    ("It must be:\nBlue", "blue"),
    ("(b)", "B"),
    ("'Zoë'", "zoë"),
]


@pytest.mark.parametrize(("completion", "answer"), PAID)
def test_paid(completion: str, answer: str):
    assert exact(completion, answer, {}) == 1.0


UNPAID = [
    ("", "12"),
    ("13", "12"),
    ("-12", "12"),
    ("12 or 13", "12"),
    (" ".join(map(str, range(100))), "12"),
    ("120", "12"),
    ("1.2", "12"),
    ("12/4", "3"),  # the question repeated
    ("12/4", "4"),
    ("6/8", "3/4"),
    ("1/0", "0"),
    ("0.1", "0.10000000000000001"),  # equal as floats
    ("100000000000000000000000000000000000001", "100000000000000000000000000000000000002"),
    ("twelve", "12"),
    ("１２", "12"),  # full-width digits: int() would take them
    ("1２", "1"),
    ("1２", "2"),
    ("١٢", "12"),
    ("x12", "12"),
    ("1e999999999", "1"),
    ("1e999999999999999999999999", "1"),
    ("1e999999999999999999999999", "1e999999999999999999999999"),  # beyond exact arithmetic: never paid, never raised
    ("nan", "12"),
    ("inf", "12"),
    ("red, blue, green", "blue"),
    ("blueish", "blue"),
    ("blue\nred", "blue"),
    ("", ""),
    ("anything", ""),
    ("...", "..."),
    ("C", "C++"),
    ("(1, 2)", "[1, 2]"),
    ("\x00\ud800", "12"),
]


@pytest.mark.parametrize(("completion", "answer"), UNPAID)
def test_unpaid(completion: str, answer: str):
    assert exact(completion, answer, {}) == 0.0


HOSTILE = [
    "1" * 10**6,
    "1," * 10**6,
    "1,000" * 10**5 + "x",
    "#### " + "1/1.1" * 10**5 + "x",
    "####" * 10**5,
    "#### " * 10**5,
    "1." * 10**6,
    "." * 10**6,
    "-$" * 10**6,
    "\\boxed{" * 10**5,
    "\\boxed{" * 10**5 + "}" * 10**5,
    "\\boxed" + " " * 10**6,
    "\\frac{1}{" * 10**5,
    "\\text{" * 10**5,
    "{" * 10**6,
    "answer is " * 10**5,
    "answer" + " " * 10**6,
    "answer: " + "*" * 10**6,
    "<answer>" * 10**5,
    "١" * 10**6,
    "1e" * 10**6,
    "1" * 90_000 + "２",
    "\n" * 10**6,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_is_read_in_linear_time(text: str):
    started = time.perf_counter()
    assert exact(text, "12", {}) == 0.0
    assert exact(text, "twelve", {}) == 0.0
    assert time.perf_counter() - started < 5.0  # seconds; takes about 0.1, a quadratic step minutes


def test_only_the_end_of_a_long_text_is_read():
    assert exact("\\boxed{12}" + " " * MAX_CHARS, "12", {}) == 0.0
    assert exact(" " * MAX_CHARS + "\\boxed{12}", "12", {}) == 1.0


def test_more_candidates_never_pay_more_than_the_last_one():
    # Whatever a policy lists, among all answers 0..99 exactly one is paid for.
    for text in ("1 2 3", "answer: 7 \\boxed{8} <answer>9</answer> 10", "#### 4\n5", "3, 4 or 5"):
        assert sum(exact(text, str(answer), {}) for answer in range(100)) == 1.0


def test_without_a_reference():
    with pytest.raises(RewardError, match=r"data\.answer_field"):
        exact("12", None, {})
