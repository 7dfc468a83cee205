"""Training a reward model: transformers' gradient under every layout; it learns, and exports what it learned."""

from __future__ import annotations

import json
import random

import pytest
import scoring
import tiny
import torch
from sharded import hugging_face, whole

from grpo_mega.config.loading import validate_as
from grpo_mega.config.reward_training import RewardRecipe
from grpo_mega.data.conversations import Reading
from grpo_mega.data.judgements import read_judgements
from grpo_mega.errors import ConfigError, DataError
from grpo_mega.model.families import read_scored
from grpo_mega.objective.reward_model import label_loss, preference_loss
from grpo_mega.parallel import mesh
from grpo_mega.trainer import reward_main
from grpo_mega.trainer.check import check_reward
from grpo_mega.trainer.reward_main import rows_of_step, train_reward

LAYOUTS = [
    {},  # two data ranks: the answers of a pair that is no group are on different ones
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"context": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
]
LABELS = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 1.0], dtype=torch.float64)


def readings():
    """Three groups of two conversations; of the second pair no two tokens agree, a third has two scored places."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(tiny.VOCABULARY, (n,), generator=generator).tolist())  # noqa: E731
    prompt, other = draw(6), draw(9)
    several = [(0, prompt + draw(5)), (0, prompt + draw(11)), (1, draw(4)), (1, draw(13)), (2, other + draw(3))]
    read = [(group, Reading(ids, (len(ids) - 1,))) for group, ids in several]
    group, last = read[-1]
    return [*read[:-1], (group, Reading(last.token_ids, (9, len(last.token_ids) - 1)))]


LOSSES = {"preference": preference_loss, "label": lambda scores: label_loss(scores, LABELS)}


# ---- on the ranks


def gradients(folder, layouts, kinds):
    """Of each layout and kind of loss: loss, accuracy, and this rank's gradients as parts of Hugging Face tensors."""
    from megatron.core import parallel_state

    from grpo_mega.config import OptimizerConfig, ParallelConfig
    from grpo_mega.model.bridge import Place
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.trainer.heads import ScoreHead
    from grpo_mega.trainer.policy import Policy
    from grpo_mega.trainer.reward_training import RewardTrainer

    found = []
    for layout in layouts:
        parallel_state.destroy_model_parallel()
        parallel = ParallelConfig(**layout)
        grid, arch = mesh.initialize(**parallel.sizes), read_scored(folder)
        model = build_model(arch, grid, parallel, dtype=torch.float64)
        policy = Policy(ScoreHead(model, grid), OptimizerConfig(), num_steps=1)
        policy.update = policy.gradients  # megatron's optimizer knows no float64; and no step is wanted
        trainer = RewardTrainer(policy, arch, capacity=24)
        place = Place.of(grid, layers_per_stage(arch, parallel.stages))
        for kind in kinds:
            metrics = trainer.update(readings(), LOSSES[kind])
            values = {name: metrics[name].value() for name in ("loss", "accuracy", "margin")}
            # clones: the next kind's go into the same buffers
            parts = [(*where, part.clone()) for *where, part in hugging_face(model, arch, place)]
            found.append({"values": values, "gradients": parts})
    return found


def run(tree, flipped=False):
    """`grpo-mega reward`'s ranks; flipped: the loss has the wrong sign."""
    if flipped:
        right = reward_main.preference_loss

        def wrong(scores):
            loss, metrics = right(scores)
            return -loss, metrics

        reward_main.preference_loss = wrong
    try:
        train_reward(validate_as(RewardRecipe, tree))
    finally:
        if flipped:
            reward_main.preference_loss = right


# ---- the tests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two labels and a bias: all that a head can have."""
    return scoring.make_scored(tmp_path_factory.mktemp("scored") / "model", kind="Token", labels=2)


def test_gradients_are_transformers_under_every_layout(ranks, model):
    from transformers import AutoModelForTokenClassification

    by_rank = ranks(2, gradients, model, LAYOUTS, list(LOSSES), timeout=120)
    dense = AutoModelForTokenClassification.from_pretrained(model, attn_implementation="eager").double().eval()
    for n, shares in enumerate(zip(*by_rank, strict=True)):
        layout, kind = LAYOUTS[n // len(LOSSES)], list(LOSSES)[n % len(LOSSES)]
        dense.zero_grad()
        scores = []
        for _, reading in readings():
            z = dense(torch.tensor([reading.token_ids])).logits[0]
            scores += [z[place, 1] - z[place, 0] for place in reading.places]
        loss, metrics = LOSSES[kind](torch.stack(scores))
        loss.backward()
        wanted = {name: parameter.grad for name, parameter in dense.named_parameters()}
        for share in shares:
            assert share["values"]["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert share["values"]["accuracy"] == metrics["accuracy"].value()
        for name, tensor in whole(shares, wanted).items():
            scale = tensor.abs().max().item()
            at = f"{layout}, {kind}, {name}"
            torch.testing.assert_close(
                tensor, wanted[name], rtol=0, atol=1e-5 * scale, msg=lambda text, at=at: f"{at}: {text}"
            )


def preferences(folder):
    """Answers are three letters; preferred are those of the first half of the alphabet. Prompts say nothing of it."""
    rng, rows = random.Random(1), []
    for n in range(120):
        good, bad = ("".join(rng.choice(letters) for _ in range(3)) for letters in ("abcdefghijklm", "nopqrstuvwxyz"))
        rows.append({"prompt": f"{n}?", "chosen": good, "rejected": bad})
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A language model that is to become a reward model, and the rows."""
    base = tmp_path_factory.mktemp("learning")
    folder = tiny.make_model(base / "model", **scoring.SHAPE, tied=True)
    file, rows = preferences(base)
    return rows, {
        "model": {"path": str(folder)},
        "data": {"jsonl": str(file), "heldout": 40},
        "batch": {"examples_per_step": 16, "tokens_per_microbatch": 256},
        "optimizer": {"lr": 0.02},
        "run": {"directory": "unused", "num_steps": 14, "evaluate_every": 7, "save_every": 7},
    }


def evaluations(directory):
    return [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]


def test_it_learns_preferences_and_exports_what_it_learned(ranks, tree, tmp_path):
    rows, recipe = tree
    recipe = recipe | {"run": recipe["run"] | {"directory": str(tmp_path / "run")}}
    ranks(2, run, recipe | {"run": recipe["run"] | {"num_steps": 7}})
    ranks(2, run, recipe | {"parallel": {"pipeline": 2}})  # goes on under another layout
    before, half, last = evaluations(tmp_path / "run")
    assert before["accuracy"] == 0.5 and before["loss"] == pytest.approx(0.693147, abs=1e-6)  # a head of zeros
    assert half["accuracy"] >= 0.7 and last["accuracy"] >= 0.95 and last["loss"] < 0.3
    scores = scoring.by_transformers(
        tmp_path / "run" / "hf", [(row["prompt"], row[kind]) for row in rows for kind in ("chosen", "rejected")]
    )[:, 0]
    assert (scores[0::2] > scores[1::2]).float().mean() >= 0.95
    # transformers on the exported folder: the very loss that the trainer reported of the held-out rows
    heldout = [i for i, row in enumerate(rows) if row["prompt"] in held_out(recipe)]
    pairs = torch.stack((scores[0::2][heldout], scores[1::2][heldout]), dim=1).flatten().double()
    assert preference_loss(pairs)[0].item() == pytest.approx(last["loss"], abs=1e-5)


def held_out(recipe):
    from grpo_mega.data.judgements import hold_out
    from grpo_mega.data.mixture import shuffled

    _, rows = read_judgements(recipe["data"]["jsonl"], "data.jsonl")
    _, heldout = hold_out(rows, recipe["data"]["heldout"], shuffled(len(rows), "heldout", 0))
    assert len(heldout) == 40
    return {row.messages[0]["content"] for row in heldout}


def test_it_does_not_learn_with_the_wrong_sign(ranks, tree, tmp_path):
    _, recipe = tree
    ranks(2, run, recipe | {"run": recipe["run"] | {"directory": str(tmp_path / "run"), "save_every": 0}}, True)
    assert evaluations(tmp_path / "run")[-1]["accuracy"] < 0.1


def test_rows_of_steps_are_epochs():
    steps = [rows_of_step(10, step, 4, seed=1) for step in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


# ---- mistakes

ROWS = [
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "x.jsonl:1: chosen and rejected are the same text"),
    ('{"prompt": "a", "chosen": "b"}', "x.jsonl:1: there is no field 'rejected', and the file's first row"),
    (
        '{"prompt": "a", "answer": "b"}',
        "x.jsonl:1: the row has the fields 'prompt', 'answer'; write prompt, chosen",
    ),
    ('{"prompt": "a", "completion": "b", "label": 2}', "x.jsonl:1: 'label' is 2; write 1 or true for a right answer"),
    ('{"prompt": "a", "completion": 7, "label": 1}', "x.jsonl:1: 'completion' is 7, not a text; write the answer as"),
    (
        '{"prompt": "a", "completion": "b", "label": 1}\n{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "x.jsonl:2: there is no field 'completion', and the file's first row is a label",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), ROWS)
def test_rows_that_teach_nothing_are_refused(tmp_path, text, sentence):
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(DataError) as caught:
        read_judgements(str(tmp_path / "x.jsonl"), "data.jsonl")
    assert sentence in str(caught.value)


def test_recipes_that_cannot_work_are_refused(tree):
    _, recipe = tree
    for change, sentence in (
        ({"optimizer": {"warmup_steps": 99}}, "optimizer.warmup_steps=99 exceeds run.num_steps=14; warm up for fewer"),
        ({"grpo": {}}, "unknown key grpo"),
        ({"data": {"jsonl": "x", "heldot": 3}}, "unknown key data.heldot; did you mean 'heldout'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            validate_as(RewardRecipe, recipe | change)
        assert sentence in str(caught.value)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3 does not divide the model's 4 attention heads"):
        check_reward(validate_as(RewardRecipe, recipe | {"parallel": {"tensor": 3}}), 3)
