"""Reward models: transformers' scores under every layout, whatever is packed with what, in a run and out of one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import scoring
import tiny
import torch

from grpo_mega.config import validate_recipe
from grpo_mega.data.conversations import Reading
from grpo_mega.errors import ConfigError, DataError
from grpo_mega.model.families import read_architecture
from grpo_mega.parallel import mesh
from grpo_mega.rewards.score import Asked
from grpo_mega.trainer import main
from grpo_mega.trainer.check import check_cheaply
from grpo_mega.trainer.records import RunDirectory
from grpo_mega.trainer.reward_model import build_reward_models, check_conversations, read_judges, value_of
from grpo_mega.types import Completion, Prompt

FAMILIES = ("llama3", "mistral-window", "qwen2-tied", "qwen3_moe-raw", "gemma3", "deepseek_v3")
PROMPTS = {"2+2?": ("4", "five", "4", "3, or 4: four"), "Name a very long river, please": ("Nile", "I do not know"),
           "x": ("y" * 20,)}  # fmt: skip
TEXTS = [(prompt, answer) for prompt, answers in PROMPTS.items() for answer in answers]
LIMIT = 20  # tokens of a conversation in the test of a run: some are longer
LAYOUTS = {  # training's layout, and what reward_models says; two ranks
    "DP2": ({}, {}),
    "DP2, TP2": ({}, {"tensor": 2}),
    "DP2, SP2": ({}, {"tensor": 2, "sequence": True}),
    "DP2, PP2": ({}, {"pipeline": 2}),
    "DP2, CP2 offload": ({}, {"context": 2, "offload": True}),
    "TP2": ({"tensor": 2}, {}),
    "PP2 offload": ({"pipeline": 2}, {"offload": True}),
    "CP2": ({"context": 2}, {}),
    "SP2, DP2": ({"tensor": 2, "sequence": True}, {"tensor": 1}),
    "PP2 virtual 2, CP2": ({"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}),
}


def tree_of(policy, model, **sections):
    return {
        "model": {"path": str(policy)},
        "data": {"jsonl": "unused", "heldout": 0},
        "reward": {"model": "judge"},
        "reward_models": {"judge": {"path": str(model)}},
        "sampling": {"max_completion_tokens": 9},
        "grpo": {"group_size": 2, "kl_coef": 0.0},
        "batch": {"prompts_per_step": 2, "tokens_per_microbatch": 40},
        "run": {"directory": "unused"},
    } | sections


def pairs():
    """The texts as completions of prompts, as parts of a reward are asked about them."""
    made = {p: Prompt(n, p, (1,), messages=({"role": "user", "content": p},)) for n, p in enumerate(PROMPTS)}
    return [Asked(made[p], Completion((1,), (-1.0,), "stop", text=answer), [], []) for p, answer in TEXTS]


def stepped(prompt, steps):
    """A completion in steps."""
    made = Prompt(0, prompt, (1,), messages=({"role": "user", "content": prompt},))
    return Asked(made, Completion((1,), (-1.0,), "stop", text="".join(steps)), list(steps), [0] * len(steps))


def length(text, answer, row):
    return len(text) % 3


# ---- on the ranks


def outcomes(trees):
    """Every rank's values of its share of the texts, under each recipe: {place among the texts: outcome}."""
    from megatron.core import parallel_state

    found = []
    for tree in trees:
        parallel_state.destroy_model_parallel()  # of the layout before
        recipe = validate_recipe(tree)
        grid = mesh.initialize(**recipe.parallel.sizes)
        (model,) = build_reward_models(recipe, read_judges(recipe), grid).values()
        mine = list(range(grid.data.rank, len(TEXTS), grid.data.size))
        several = pairs()
        first = model.outcomes([several[i] for i in mine])
        assert model.outcomes([several[i] for i in mine]) == first  # host memory brings back what it took
        found.append(dict(zip(mine, first, strict=True)))
    return found


def step_outcomes(trees, texts):
    """Every rank's values of all the stepped texts, under each recipe."""
    from megatron.core import parallel_state

    found = []
    for tree in trees:
        parallel_state.destroy_model_parallel()
        recipe = validate_recipe(tree)
        grid = mesh.initialize(**recipe.parallel.sizes)
        (model,) = build_reward_models(recipe, read_judges(recipe), grid).values()
        found.append(model.outcomes([stepped(*text) for text in texts]))
    return found


def train(tree):
    main.train(validate_recipe(tree))


# ---- the tests


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("policy") / "policy", **scoring.SHAPE, tied=False)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return scoring.make_scored(tmp_path_factory.mktemp("judge") / "judge")


def test_every_familys_scores_are_transformers(ranks, policy, tmp_path):
    folders = {name: scoring.make_scored(tmp_path / name, name) for name in FAMILIES}
    (found,) = ranks(1, outcomes, [tree_of(policy, folder) for folder in folders.values()], timeout=120)
    for name, values in zip(folders, found, strict=True):
        wanted = scoring.by_transformers(folders[name], TEXTS)[:, 0]
        assert wanted.std() > 0.1
        scores = torch.tensor([values[i][0][0] for i in range(len(TEXTS))])
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5 * max(1, wanted.abs().max().item()), msg=name)


def test_heads_of_two_labels_and_of_tokens(ranks, policy, tmp_path):
    kinds = {("Sequence", 2): {}, ("Token", 1): {}, ("Token", 2): {"token_classification_bias": False}}
    folders = [
        scoring.make_scored(tmp_path / f"{kind}{labels}", kind=kind, labels=labels, **more)
        for (kind, labels), more in kinds.items()
    ]
    (found,) = ranks(1, outcomes, [tree_of(policy, folder) for folder in folders])
    for (kind, labels), folder, values in zip(kinds, folders, found, strict=True):
        logits = scoring.by_transformers(folder, TEXTS, kind)
        wanted = logits[:, 0] if labels == 1 else logits.softmax(dim=1)[:, 1]
        scores = torch.tensor([values[i][0][0] for i in range(len(TEXTS))])
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)


STEPPED = [
    ("1+1? ", ("a is 1\n\n", "so 2")),  # the prompt has a separator of its own
    ("1+1? ", ("a is 1\n\n", "so 3\n\n", "no")),
    ("1+1? ", ("so 2",)),
    ("x", ("1+1\n\n", "2")),  # the completion has: it would choose where it is scored
]


def test_a_process_models_values_are_those_at_its_separators(ranks, policy, tmp_path):
    folder = scoring.make_scored(tmp_path / "process", kind="Token", labels=2)
    steps = {"reward": {"model": "judge", "steps": {}}}
    trees = [
        tree_of(policy, folder, **steps, reward_models={"judge": {"path": str(folder), "separator": "+", **own}})
        for own in ({}, {"context": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2})
    ]
    (*one, broken), *others = (shares for by_rank in ranks(2, step_outcomes, trees, STEPPED) for shares in by_rank)
    assert broken == (None, "DataError: the completion holds the separator '+'")
    for (prompt, texts), (values, fault) in zip(STEPPED, one, strict=False):
        assert fault is None and len(values) == len(texts)
        for n, value in enumerate(values):  # transformers', of the conversation that ends at that separator
            until = "".join(text + "+" for text in texts[: n + 1])
            (logits,) = scoring.by_transformers(folder, [(prompt, until)], "Token")
            assert value == pytest.approx(logits.softmax(dim=0)[1].item(), abs=1e-5)
    for other in others:
        assert other[-1] == broken
        for (values, _), (wanted, _) in zip(other, one, strict=False):
            assert values == pytest.approx(wanted, abs=1e-5)


def test_a_score_is_read_before_padding(ranks, policy, tmp_path):
    """transformers reads the last token that is not config.json's pad_token_id, in a batch of padded rows or alone."""
    folder = scoring.make_scored(tmp_path / "padded", pad_token_id=tiny.END)
    texts = [("2+2?", "4<|im_end|>"), ("2+2?", "4<|im_end|>!"), ("2+2?", "4")]
    recipe = validate_recipe(tree_of(policy, folder))
    reader = read_judges(recipe)["judge"].reader
    read = [reader.whole([{"role": "user", "content": p}], a) for p, a in texts]
    assert [len(r.token_ids) for r in read] == [7, 9, 7] and read[0] == read[2]
    assert [r.places for r in read] == [(6,), (8,), (6,)]
    wanted = scoring.by_transformers(folder, texts)[:, 0]
    assert wanted[0] == pytest.approx(wanted[2].item(), abs=1e-6) and abs(wanted[1] - wanted[0]) > 1e-3


def test_layout_packing_and_whereabouts_change_no_score(ranks, policy, judge):
    wanted = scoring.by_transformers(judge, TEXTS)[:, 0]
    trees = []
    for parallel, own in LAYOUTS.values():
        tree = tree_of(policy, judge, parallel=parallel, reward_models={"judge": {"path": str(judge), **own}})
        trees.append(tree)
    alone = {"batch": {"prompts_per_step": 2, "tokens_per_microbatch": 1}}  # one conversation a microbatch
    by_rank = ranks(2, outcomes, [*trees, trees[0] | alone, trees[4] | alone], timeout=120)
    names = [*LAYOUTS, "DP2, one by one", "CP2, one by one"]
    for n, shares in enumerate(zip(*by_rank, strict=True)):
        name = names[n]
        values = shares[0] | shares[1]
        assert sorted(values) == list(range(len(TEXTS))), name
        scores = torch.tensor([values[i][0][0] for i in range(len(TEXTS))])
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_pays_what_the_model_says(ranks, policy, judge, tmp_path):
    """Two parts by weight, the model's under a layout of its own: each completion's value is transformers'."""
    import pyarrow.parquet as pq

    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 6)))
    own = {"path": str(judge), "max_tokens": LIMIT, "tensor": 2, "offload": True}
    tree = tree_of(
        policy, judge,
        data={"jsonl": str(tmp_path / "data.jsonl"), "heldout": 0},
        reward={"parts": {"judge": {"model": "judge", "weight": 0.5}, "length": {"function": f"{__name__}:length"}}},
        reward_models={"judge": own},
        run={"directory": str(tmp_path / "run"), "num_steps": 2},
    )  # fmt: skip
    ranks(2, train, tree)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [
        row
        for file in sorted((tmp_path / "run" / "rollouts").glob("step_*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    wanted = scoring.by_transformers(judge, [(row["prompt"], row["text"]) for row in rows])[:, 0].tolist()
    tokens = [len(row["prompt"]) + len(row["text"].encode()) + 2 for row in rows]
    assert any(n > LIMIT for n in tokens) and any(n <= LIMIT for n in tokens)
    paid = []
    for row, value, count in zip(rows, wanted, tokens, strict=True):
        parts = {part["name"]: part["value"] for part in row["rewards"]}
        if count > LIMIT:
            assert row["error"].startswith(
                f"judge: DataError: the conversation has {count} tokens, more than the 20 of"
            )
            assert row["reward"] == 0.0 and parts["judge"] is None
        else:
            paid.append(parts["judge"])
            assert parts["judge"] == pytest.approx(value, abs=1e-5)
            assert row["reward"] == pytest.approx(0.5 * value + parts["length"], abs=1e-5)
    assert sum(line["reward_errors"] for line in metrics) == sum(n > LIMIT for n in tokens)
    if sum(n <= LIMIT for n in tokens[:4]):
        first = [value for value, n in zip(wanted[:4], tokens[:4], strict=True) if n <= LIMIT]
        assert metrics[0]["reward/judge"] == pytest.approx(sum(first) / len(first), abs=1e-5)
    go_on(tree, own)


def go_on(tree, own):
    """A run directory lets a reward model's layout change, and nothing else of it."""
    moved = {"path": own["path"], "max_tokens": LIMIT, "pipeline": 2}
    RunDirectory(validate_recipe(tree | {"reward_models": {"judge": moved}})).check()
    with pytest.raises(ConfigError, match=r"reward_models\.judge\.max_tokens=20, this recipe says 21"):
        RunDirectory(validate_recipe(tree | {"reward_models": {"judge": moved | {"max_tokens": 21}}})).check()


def test_value_of_a_score():
    assert value_of(-1.5, 1) == -1.5
    assert value_of(0.0, 2) == 0.5 and value_of(math.log(3), 2) == pytest.approx(0.75, abs=1e-15)
    assert value_of(-800.0, 2) == 0.0  # no overflow


# ---- mistakes

REFUSED = [
    ({"reward": {"model": "juge"}}, "reward.model=juge is no entry of reward_models; did you mean 'judge'?"),
    ({"reward": {"function": "exact"}}, "reward_models.judge is used by no part of the reward; write"),
    (
        {"reward": {"parts": {"a": {"model": "judge", "function": "exact"}}}},
        "reward.parts.a.model='judge' and reward.parts.a.function are both given; a part is a function or a model",
    ),
    ({"reward": {"model": "judge", "batch": True}}, "reward.model='judge' and reward.batch are both given"),
    ({"reward": {"parts": {"a": {}}}}, "reward.parts.a says neither function nor model; write one of them"),
    (
        {"reward": {"model": "judge", "parts": {"a": {"model": "judge"}}}},
        "reward.model and reward.parts are both given",
    ),
    ({"judge": {"tensor": 3}}, "reward_models.judge.tensor=3 does not divide the model's 4 attention heads"),
    ({"judge": {"pipeline": 8}}, "reward_models.judge.pipeline=8 exceeds the model's 4 layers; use at most 4"),
    ({"judge": {"sequence": True}}, "reward_models.judge: sequence=true needs tensor > 1"),
    ({"judge": {"max_tokens": 1}}, "reward_models.judge.max_tokens=1 should be greater than or equal to 2"),
    ({"judge": {"wight": 1}}, "unknown key reward_models.judge.wight"),
    (
        {"judge": {"separator": "+"}},
        "reward.model=judge scores steps (reward_models.judge.separator is set), and",
    ),
    (
        {"reward": {"model": "judge", "steps": {}}},
        "reward.model=judge is to score steps, and reward_models.judge",
    ),
    ({"reward_models": {"a b": {"path": "x"}}}, "reward_models: 'a b' cannot name a model; use letters, digits, _ and"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_mistakes_are_refused_before_any_rank_waits(policy, judge, change, sentence):
    tree = tree_of(policy, judge)
    tree["reward_models"]["judge"] |= change.pop("judge", {}) if "judge" in change else {}
    with pytest.raises(ConfigError) as caught:
        check_cheaply(validate_recipe(tree | change), 2)
    assert sentence in str(caught.value)


def test_folders_of_other_kinds_are_refused(policy, judge, tmp_path):
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM, whose head gives tokens, not scores; `grpo-mega rew"):
        check_cheaply(validate_recipe(tree_of(policy, policy)), 1)
    with pytest.raises(ConfigError, match="names the architecture 'LlamaForSequenceClassification'; supported: Llama"):
        read_architecture(judge)
    three = scoring.make_scored(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="has 3 labels; a reward model has one"):
        check_cheaply(validate_recipe(tree_of(policy, three)), 1)


def test_a_separator_is_one_token(policy, judge):
    tree = tree_of(policy, judge, reward={"model": "judge", "steps": {}})
    tree["reward_models"]["judge"]["separator"] = "->"
    with pytest.raises(DataError, match=r"reward_models\.judge: separator='->' is 2 tokens; use one that is a single"):
        read_judges(validate_recipe(tree))
    tree["reward_models"]["judge"]["separator"] = "<|endoftext|>"  # a special one, here and in the template
    assert read_judges(validate_recipe(tree))["judge"].reader.steps([{"role": "user", "content": "x"}], ["a", "b"]) == (
        Reading((257, 87, 257, 64, 256, 65, 256), (4, 6))
    )


def test_a_prompt_that_the_model_cannot_read_is_refused_at_the_start(policy, judge, tmp_path):
    plain = scoring.make_scored(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    judges = read_judges(validate_recipe(tree_of(policy, plain)))
    good = replace(pairs()[0].prompt, text="2+2?")
    check_conversations(judges, [good])
    reader = judges["judge"].reader
    assert reader.whole(good.messages, "4").token_ids == reader.tokenizer.text_ids("2+2?4")
    before = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    chat = replace(good, messages=(*before, *good.messages))
    with pytest.raises(DataError, match=r"reward_models\.judge cannot read '2\+2\?': a chat of 3 messages needs"):
        check_conversations(judges, [good, chat])
