"""The library's own entries and scorers, with completions that know where these scorers are soft."""

from __future__ import annotations

import time

import pytest
import reasoning_gym as library

from grpo_mega.config.reward import ReasoningGymOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import BoundedError
from grpo_mega.rewards.reasoning_gym import check_task, check_task_of, committed_answer, reasoning_gym

strict, lenient = reasoning_gym(ReasoningGymOptions()), reasoning_gym(ReasoningGymOptions(strict=False))


def entry(task, index=0, **parameters):
    return library.create_dataset(task, seed=1, size=index + 1, **parameters)[index]


def both(completion, row):
    return strict(completion, row["answer"], row), lenient(completion, row["answer"], row)


@pytest.mark.parametrize(
    ("text", "reference", "committed"),
    [
        ("7 + 5 = 12.", "12", "12"),
        ("It is 1,200 in all", "1200", "1200"),
        ("10, 11, 12", "12", "12"),
        ("<answer>12</answer> of 20", "12", "12"),
        ("twelve", "12", ""),
        ("First.\n\n**Red**\n", "Blue", "Red"),
        ("The answer is Red. I am sure.", "Blue", "Red"),
        ("<answer>\nDark Red\n</answer> bye", "Blue", "Dark Red"),
        (r"\boxed{[1, {2}]} then", "x", "[1, {2}]"),
        ("**", "x", "**"),
        ("", "x", ""),
        (" \n ", "x", ""),
        ("", "1", ""),
        ("1 2\n3 4\n", "5 6\n7 8", "1 2\n3 4"),  # the whole text
        ("Answer:\n1 2\n3 4", "5 6\n7 8", "Answer:\n1 2\n3 4"),  # a clause ends with its line: no marker here
        ("So <answer>\n1 2\n3 4\n</answer> it is", "5 6\n7 8", "1 2\n3 4"),
        ("a\nb", None, "a\nb"),
        ("x" * 10**6 + "\nlast", "word", "last"),
    ],
    ids=lambda text: ascii(str(text)[:16]),
)
def test_the_answer_that_a_completion_commits_to(text, reference, committed):
    assert committed_answer(text, reference) == committed


def test_the_right_answer_in_any_dress():
    row = entry("chain_sum")
    answer = row["answer"]
    for text in (
        answer,
        f"It is {answer}.",
        f"<answer>{answer}</answer>",
        f"so \\boxed{{{answer}}}, since 7",
        f"{answer}.0",
    ):
        assert both(text, row) == (1.0, 1.0), text


@pytest.mark.parametrize(
    "task", ["chain_sum", "letter_counting", "gsm_symbolic", "gcd", "caesar_cipher", "word_sorting"]
)
def test_lists_of_candidates_and_wrong_answers_are_not_paid(task):
    row = entry(task)
    answer = row["answer"]
    for text in (
        f"{answer} or 87654",
        f"1 2 3 {answer} 87654",
        f"<answer>{answer} x</answer> no: <answer>87654</answer>",
    ):
        assert strict(text, answer, row) == 0.0, text
    for text in ("", " \n", "87654", "?" * 10**6, "{" * 1000, "\ud800\x00\u202e", "None", "null", "[]"):
        assert strict(text, answer, row) == 0.0, text


def test_a_part_of_the_reward_counts_only_when_asked_for():
    row = entry("caesar_cipher")
    padded = f"<answer>{row['answer']} and more words</answer>"
    of_strict, of_lenient = both(padded, row)
    assert of_strict == 0.0
    assert of_lenient == pytest.approx(len(row["answer"]) / len(f"{row['answer']} and more words"))
    assert both("<answer>1 + 1</answer>", entry("countdown")) == (0.0, 0.05)


def test_a_task_whose_answer_is_not_the_only_one():
    row = entry("countdown")
    metadata = row["metadata"]
    row = {**row, "answer": "unread", "metadata": {**metadata, "numbers": [2, 3, 4], "target": 24}}
    assert both("<answer>4 * (2 * 3)</answer>", row) == (1.0, 1.0)
    assert strict("<answer>4 * 3 * 1</answer>", None, row) == 0.0


def test_tables_and_tasks_without_a_reference():
    row = entry("mini_sudoku")
    assert both(f"<answer>\n{row['answer']}\n</answer>", row) == (1.0, 1.0)
    assert strict(f"Here:\n{row['answer']}", row["answer"], row) == 0.0
    row = entry("propositional_logic")
    assert row["answer"] is None
    assert strict(f"<answer>{row['metadata']['example_answer']}</answer>", None, row) == 1.0
    assert strict("who knows", None, row) == 0.0


def test_a_scorer_that_raises_says_so():
    with pytest.raises(BoundedError, match=r"^ValueError: "):
        lenient("<answer>two times three</answer>", "2 × 3", {**entry("prime_factorization"), "answer": "2 × 3"})


def test_a_scorer_that_pays_nonsense_is_refused():
    rows = [entry("game_of_life_halting", index) for index in range(20)]
    row = next(row for row in rows if row["answer"] == "False")
    assert lenient("<answer>bananas</answer>", "False", row) == 1.0  # the library's word
    with pytest.raises(BoundedError, match=r"^RewardError: game_of_life_halting's scorer gives nonsense a full score"):
        strict("<answer>bananas</answer>", "False", row)


def test_an_endless_scorer_ends():
    hasty = reasoning_gym(ReasoningGymOptions(time_limit=0.3))
    row = {**entry("countdown"), "answer": "x"}
    start = time.monotonic()
    with pytest.raises(BoundedError, match=r"^TimeoutError: no result within its time_limit"):
        hasty("<answer>9**9**9**9</answer>", None, row)
    assert time.monotonic() - start < 20
    assert strict("<answer>1</answer>", None, row) == 0.0


def test_parameters_reach_scorers_that_read_them():
    row = {**entry("puzzle24", max_value=6), "answer": "x"}
    eights = "<answer>8 + 8 + 4 + 4</answer>"  # 24, of numbers that the task has by default and this one has not
    assert strict(eights, "x", row) == 1.0
    narrow = reasoning_gym(ReasoningGymOptions(tasks={"puzzle24": {"max_value": 6}}))
    assert narrow(eights, "x", row) == 0.0
    assert narrow("<answer>6 * 4 * 1 * 1</answer>", "x", row) == 1.0


def test_what_a_row_and_options_must_say():
    check_task_of(entry("chain_sum"))
    for row in ({}, {"metadata": None}, {"metadata": {"source_dataset": 3}}):
        with pytest.raises(RewardError, match=r"^there is no metadata\.source_dataset, by which "):
            check_task_of(row)
    with pytest.raises(RewardError, match=r"^'chain_sums' is no task of reasoning-gym; did you mean 'chain_sum'"):
        check_task_of({"metadata": {"source_dataset": "chain_sums"}})
    with pytest.raises(
        RewardError, match=r"^tasks\.puzzle24\.max_valu is no parameter of puzzle24; did you mean 'max_v"
    ):
        check_task("puzzle24", {"max_valu": 3})
    with pytest.raises(
        RewardError, match=r"^tasks\.puzzle24=\{'max_value': 99\} does not suit the task \(AssertionError: "
    ):
        check_task("puzzle24", {"max_value": 99})
