"""What is equal as mathematics, what is not, and what no comparison may be held up by."""

from __future__ import annotations

import threading
import time

import pytest

from grpo_mega.config.reward import MathVerifyOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import BoundedError
from grpo_mega.rewards.math_verify import MAX_CHARS, math_verify

score = math_verify(MathVerifyOptions())

PAID = [
    ("The answer is 12.", "12"),
    ("<answer>12</answer>", "12"),
    (r"\boxed{12.0} after 3 steps", "12"),
    (r"\boxed{9 + 1 = 10}", "10"),
    ("9 + 1 = 10", "10"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{\left(3\right)}", "3"),
    (r"so \boxed{\sqrt{8}}", r"2\sqrt{2}"),
    ("0.5", r"\frac{1}{2}"),
    (r"\boxed{\frac{2}{4}}", "1/2"),
    (r"\boxed{\frac{2}{\sqrt{2}}}", r"\sqrt{2}"),
    ("thus $1+x^2$", "x^2+1"),
    (r"<answer>\(x^2+2x+1\)</answer>", "(x+1)^2"),
    ("<answer>x = 3</answer>", "3"),
    ("<answer>The sum is 12</answer>", "12"),
    (r"$\{2,1\}$", r"\{1,2\}"),
    (r"12 \text{ cm}", "12 cm"),
    ("<answer>3</answer> or 4", "6 / 2 = <<6/2=3>>3\n#### 3"),
    (r"\boxed{{{3}}}", "3"),
    ("Zoë 🙂 \u200b\u202e therefore \\boxed{3}", "3"),
]


@pytest.mark.parametrize(("completion", "answer"), PAID)
def test_paid(completion, answer):
    assert score(completion, answer, {}) == 1.0


UNPAID = [
    ("", "12"),
    (" \n\t", "12"),
    ("no mathematics", "12"),
    ("13", "12"),
    ("120", "12"),
    ("12 or 13", "12"),
    (r"\boxed{12} \boxed{13}", "12"),  # a set of two
    ("$12$ or $13$", "12"),
    (r"\boxed{10, 11, 12}", "12"),
    ("<answer>10, 11, 12</answer>", "12"),
    ("<answer>12 or 13</answer>", "12"),
    (r"\boxed{12 = 13}", "12"),
    ("To solve the equation 9 + 1 =, we can start by", "10"),  # the question repeated
    (r"\boxed{9 + 1}", "10"),
    ("<answer>9+1</answer>", "10"),
    ("$9+1$", "10"),
    ("<answer>12 - 2</answer>", "10"),
    (r"<answer>2 \times 5</answer>", "10"),
    ("<answer>2 * 5</answer>", "10"),
    ("<answer>2(5)</answer>", "10"),
    ("<answer>20/2</answer>", "10"),
    (r"\boxed{\frac{20}{2}}", "10"),
    (r"\boxed{\sqrt{100}}", "10"),
    (r"\boxed{3^2}", "9"),
    ("3!", "6"),
    (r"\boxed{10 = 9 + 1}", "10"),
    (r"\boxed{11} 12", "12"),  # the marked one is what it commits to
    (r"\boxed{1.41421}", r"\sqrt{2}"),
    ("$x^2$", "y^2"),
    ("\\boxed{" * 2000, "12"),
    ("{" * 9000 + "}" * 9000, "12"),
    ("\\frac{" * 2000, "12"),
    ("$" * 10_001, "12"),
    ("1" * 10**6, "12"),
    ("\x00\ud800", "12"),
    ("\\boxed{3}" + " " * MAX_CHARS + "4", "3"),  # only the end of a long text is read
]


@pytest.mark.parametrize(("completion", "answer"), UNPAID, ids=lambda text: ascii(text[:20]))
def test_unpaid(completion, answer):
    assert score(completion, answer, {}) == 0.0


@pytest.mark.parametrize(
    "text", [r"\boxed{9^{9^{9^9}}}", r"$\boxed{(((9!)!)!)}$", r"\boxed{" + "{" * 3000 + "}" * 3001]
)
def test_an_endless_comparison_ends_and_the_next_is_right(text):
    hasty = math_verify(MathVerifyOptions(time_limit=0.3))
    start = time.monotonic()
    with pytest.raises(BoundedError, match=r"^TimeoutError: no result within its time_limit"):
        hasty(text, "x^2", {})
    assert time.monotonic() - start < 15
    assert score("12", "12", {}) == 1.0


def test_outside_the_main_thread():
    """Where math-verify's own alarm signal cannot be set."""
    results = []
    thread = threading.Thread(target=lambda: results.append(score(r"\boxed{\frac{1}{2}}", "0.5", {})))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_references_that_cannot_be_compared_with():
    with pytest.raises(BoundedError, match=r"^RewardError: the reference answer 'red' is no mathematics"):
        score("12", "red", {})
    with pytest.raises(RewardError, match=r"data\.answer_field"):
        score("12", None, {})
