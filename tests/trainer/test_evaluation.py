"""Evaluation by hand, with completions that are written here; what a model answers is in test_standalone."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import tiny

from grpo_mega.config import validate_recipe
from grpo_mega.trainer.evaluation import Examination, examine
from grpo_mega.trainer.policy import silent
from grpo_mega.trainer.scoring import Scoring
from grpo_mega.trainer.standalone import read_inputs, result_of, table
from grpo_mega.types import Completion

ALONE = SimpleNamespace(group=None)
MESH = SimpleNamespace(
    share=lambda count: list(range(count)), leads_replica=True, replica=ALONE, context=ALONE, data=ALONE
)
GSM8K = [
    {"question": "6 times 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
    {"question": "3 times 400?", "answer": "3 * 400 = 1200\n#### 1,200"},
    {"question": "1 plus 1?", "answer": "#### 2"},
]
MATH = [
    {"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    {"problem": "Factor $x^2-1$.", "solution": r"We get $\boxed{(x-1)(x+1)}$."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    return tiny.make_model(tmp_path_factory.mktemp("evaluation") / "model", num_key_value_heads=2, **shape)


class Canned:
    """A sampler whose completions are known: texts of each prompt, "length" where a text ends in an ellipsis."""

    def __init__(self, texts):
        self.texts = texts

    def sample(self, prompts, mine, group_size, step):
        assert all(len(texts) == group_size for texts in self.texts.values())
        return [
            [
                Completion((1,) * len(text), (0.0,) * len(text), "length" if text.endswith("...") else "stop", text, 1)
                for text in self.texts[prompts[i].text]
            ]
            for i in mine
        ]


@pytest.fixture
def examined(model, tmp_path):
    """examined(rows or data section, texts by prompt, reward, evaluation) -> (recipe, Evaluation)."""

    def examined(rows, texts, reward, evaluation, **fields):
        if isinstance(rows, list):
            (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            rows = {"heldout_source": {"jsonl": str(tmp_path / "test.jsonl"), **fields}}
        recipe = validate_recipe(
            {"model": {"path": str(model)}, "data": rows, "reward": reward, "evaluation": evaluation,
             "sampling": {"max_completion_tokens": 8}, "run": {"directory": str(tmp_path / "run")}}
        )  # fmt: skip
        inputs = read_inputs(recipe, 1)
        canned = Canned(texts(inputs.prompts) if callable(texts) else texts)
        scoring = Scoring(recipe.reward, inputs.reward, {}, inputs.tokenizer.decode, MESH, silent)
        return recipe, examine(Examination(recipe, inputs.prompts, scoring, canned, MESH), inputs.step)

    return examined


def test_gsm8k_by_hand(examined):
    texts = {
        "6 times 7?": ["#### 42", r"\boxed{42}", "The answer is 41.", "41.0"],
        "3 times 400?": ["$1200$", "1,300", "It is 1300", "I cannot say..."],
        "1 plus 1?": ["3", "5", "1 + 1", "<answer>5</answer>"],
    }
    evaluation = {"completions": 4, "pass_at": [1, 2, 4], "maj_at": [1, 3, 4]}
    recipe, found = examined(
        GSM8K, texts, {"function": "math_verify"}, evaluation, prompt_field="question", answer_field="answer"
    )
    assert [group.prompt.text for group in found.groups] == [prompt for prompt in sorted(texts, key=order(found))]
    counts = {group.prompt.text: verdict.counts for group, verdict in zip(found.groups, found.verdicts, strict=True)}
    assert counts == {"6 times 7?": (2, (2,), 0), "3 times 400?": (1, (2,), 1), "1 plus 1?": (0, (2, 1, 1), 0)}
    means = {name: of.mean for name, of in found.estimates.items()}
    assert means == pytest.approx(
        {
            "reward": 0.25,
            "pass@1": 0.25,  # (2/4 + 1/4 + 0) / 3
            "pass@2": (5 / 6 + 3 / 6) / 3,
            "pass@4": 2 / 3,
            "maj@1": 0.25,
            # of a, a, b, b half of the four triples are won; of a, b, b, - one is lost, two are ties, and one is lost
            "maj@3": (1 / 2 + (0 + 1 / 2 + 1 / 2 + 0) / 4) / 3,
            "maj@4": (1 / 2 + 0 + 0) / 3,
            "completion_tokens": sum(len(text) for several in texts.values() for text in several) / 12,
            "truncated": 1 / 12,
        }
    )
    # values 1/2, 1/4, 0: s^2 / N = 1/48, n_eff = 9, t = 4.303
    t2, p, n = 4.3027**2, 0.25, 9
    half = math.sqrt(t2 * (p * (1 - p) / n + t2 / (4 * n * n)))
    assert found.estimates["pass@1"].high == pytest.approx((p + t2 / (2 * n) + half) / (1 + t2 / n), abs=1e-4)
    assert found.estimates["reward"].low == pytest.approx(0.25 - 4.3027 / math.sqrt(48), abs=1e-4)
    assert found.counts == {"problems": 3, "completions": 4, "reward_errors": 0, "near_boundary_draws": 12}
    record = found.record()
    assert record["pass@2"] == means["pass@2"] and record["pass@2_low"] == found.estimates["pass@2"].low
    assert "reward 0.250 (-0.371 to 0.871), pass@1 0.250 (" in found.line()
    assert found.line().endswith("; 3 problems x 4 completions")
    kept = result_of(recipe, found)
    assert kept["metrics"]["maj@4"]["mean"] == pytest.approx(1 / 6) and kept["correct"] == "math_verify"
    assert [line.split()[:2] for line in table(found)[1:3]] == [["mean", "95"], ["reward", "0.250"]]


def order(found):
    """The problems' indices -1, -2, ... say in which order they stand."""
    return {group.prompt.text: -group.prompt.index for group in found.groups}.__getitem__


def test_math_by_hand(examined):
    texts = {
        "Half of one?": [r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{2}"],
        "Factor $x^2-1$.": [r"$x+y$", r"\boxed{y+x}", r"\boxed{(x+1)(x-1)}"],
    }
    evaluation = {"completions": 3, "pass_at": [1], "maj_at": [3]}
    fields = {"prompt_field": "problem", "answer_field": "solution"}
    _, found = examined(MATH, texts, {"function": "math_verify"}, evaluation, **fields)
    by_text = {group.prompt.text: verdict for group, verdict in zip(found.groups, found.verdicts, strict=True)}
    assert by_text["Half of one?"].correct == (True, True, False)
    assert by_text["Factor $x^2-1$."].counts == (1, (2,), 0)  # x + y and y + x are one answer
    assert found.estimates["pass@1"].mean == 0.5 and found.estimates["maj@3"].mean == 0.5


def test_a_task_of_reasoning_gym_by_hand(examined):
    data = {"reasoning_gym": "chain_sum", "task": {"size": 20}, "heldout": 2}

    def texts(prompts):
        assert [prompt.index for prompt in prompts] == [-1, -2]
        return {prompts[0].text: [prompts[0].answer, "0.5"], prompts[1].text: ["0.5", ""]}

    reward = {"parts": {"tidy": {"function": "format"}, "right": {"function": "reasoning_gym"}}}
    recipe, found = examined(data, texts, reward, {"completions": 2, "pass_at": [1, 2], "maj_at": [2]})
    assert [verdict.counts for verdict in found.verdicts] == [(1, (1,), 0), (0, (1,), 1)]
    means = {name: of.mean for name, of in found.estimates.items() if "@" in name}
    assert means == {"pass@1": 0.25, "pass@2": 0.5, "maj@2": 0.25}
    assert recipe.evaluation.correct_part(recipe.reward) == "right"


def test_one_problem_says_nothing_about_others(examined):
    _, found = examined(
        GSM8K[:1], {"6 times 7?": ["42"]}, {"function": "exact"}, {"completions": 1}, prompt_field="question"
    )
    record = found.record()
    assert (record["pass@1"], record["pass@1_low"], record["pass@1_high"]) == (1.0, 0.0, 1.0)
    assert record["reward_low"] != record["reward_low"]
    assert "reward 1.000, pass@1 1.000 (0.000 to 1.000); 1 problems x 1" in found.line()
    assert "reward                1.000   none of one problem" in table(found)


def test_a_cut_completion_nobody_was_asked_about(examined):
    reward = {"function": "exact", "truncated": "penalize", "truncation_reward": -1.0}
    texts = {"6 times 7?": ["42", "42 or 41..."]}
    _, found = examined(GSM8K[:1], texts, reward, {"completions": 2, "pass_at": [1, 2]}, prompt_field="question")
    assert found.verdicts[0].correct == (True, False)
    assert found.estimates["reward"].mean == 0.0 and found.estimates["pass@2"].mean == 1.0
