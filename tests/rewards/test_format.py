from __future__ import annotations

import time

import pytest

from grpo_mega.config.reward import FormatOptions
from grpo_mega.rewards.format import tagged

GOOD = [
    "<think>7 + 5</think><answer>12</answer>",
    "  <think>\n7 + 5\n</think>\n\n<answer> 12 </answer>\n",
    "<think>a < b and c > d, {{}} </b> 🙂\ud800</think><answer><b>1</b></answer>",
]
BAD = [
    "",
    "12",
    "<think>7 + 5</think>",
    "<think>7 + 5</think><answer>12",
    "<think>7 + 5<answer>12</answer></think>",
    "<answer>12</answer><think>7 + 5</think>",
    "<think></think><answer>12</answer>",
    "<think>7 + 5</think><answer> \n </answer>",
    "So: <think>7 + 5</think><answer>12</answer>",
    "<think>7 + 5</think> so <answer>12</answer>",
    "<think>7 + 5</think><answer>12</answer> Right?",
    "<think>7 + 5</think><answer>11</answer><answer>12</answer>",
    "<think>7 + 5</think><think>no</think><answer>12</answer>",
    "<think><think>7 + 5</think></think><answer>12</answer>",
    "<think>the <answer> tag</think><answer>12</answer>",
    "<THINK>7 + 5</THINK><ANSWER>12</ANSWER>",
    "< think>7 + 5</think><answer>12</answer>",
    "</think>7 + 5<think><answer>12</answer>",
]


@pytest.mark.parametrize(("text", "reward"), [*((t, 1.0) for t in GOOD), *((t, 0.0) for t in BAD)], ids=ascii)
def test_blocks_in_order_each_once_and_nothing_else(text, reward):
    assert tagged(FormatOptions())(text, None, {}) == reward


def test_other_tags():
    reward = tagged(FormatOptions(tags=("answer",)))
    assert reward("<answer>12</answer>", None, {}) == 1.0
    assert reward("<think>1</think><answer>12</answer>", None, {}) == 0.0
    three = tagged(FormatOptions(tags=("plan", "think", "answer")))
    assert three("<plan>p</plan><think>t</think><answer>a</answer>", None, {}) == 1.0
    assert three("<think>t</think><plan>p</plan><answer>a</answer>", None, {}) == 0.0


def test_where_the_prompt_opened_the_first_tag():
    reward = tagged(FormatOptions(opened=True))
    assert reward("7 + 5</think><answer>12</answer>", None, {}) == 1.0
    assert reward("<think>7 + 5</think><answer>12</answer>", None, {}) == 0.0
    assert reward("</think><answer>12</answer>", None, {}) == 0.0


@pytest.mark.parametrize("text", ["<think>" * 10**6, "<" * 10**7, "<think>" + "</" * 10**6], ids=["tags", "<", "</"])
def test_huge_texts_are_read_in_linear_time(text):
    start = time.monotonic()
    assert tagged(FormatOptions())(text, None, {}) == 0.0
    assert time.monotonic() - start < 5
