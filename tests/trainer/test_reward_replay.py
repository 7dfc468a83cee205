"""A reward model that learns while the policy does: from which completions, and that a resumed run goes on with it."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import scoring
import tiny
import torch

from grpo_mega.config import validate_recipe
from grpo_mega.errors import ConfigError, RewardError
from grpo_mega.objective.reward_model import label_loss
from grpo_mega.trainer import main
from grpo_mega.trainer.reward_replay import _iteration, _rows


def even(text, answer, row):
    return float(len(text) % 2 == 0)


def train(tree):
    main.train(validate_recipe(tree))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    base = tmp_path_factory.mktemp("replay")
    (base / "data.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 6)))
    judge = scoring.make_scored(base / "judge")
    continual = {"labels": "even", "every": 2, "replay": 0.5, "lr": 0.001, "examples_per_step": 100}
    return {
        "model": {"path": str(tiny.make_model(base / "policy", **scoring.SHAPE, tied=False))},
        "data": {"jsonl": str(base / "data.jsonl"), "heldout": 0},
        "reward": {"parts": {"judge": {"model": "rm"}, "even": {"function": f"{__name__}:even", "weight": 0.0}}},
        "reward_models": {"rm": {"path": str(judge), "train": continual}},
        "sampling": {"max_completion_tokens": 5},
        "grpo": {"group_size": 3, "kl_coef": 0.0},
        "batch": {"prompts_per_step": 2, "tokens_per_microbatch": 40},
        "optimizer": {"lr": 0.001},
        "run": {"directory": str(base / "whole"), "num_steps": 5, "save_every": 3},
    }


def lines(directory, name):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def rows_of(directory, *steps):
    return [
        row for step in steps for row in pq.read_table(directory / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
    ]


def value(row, name):
    return next(part["value"] for part in row["rewards"] if part["name"] == name)


def test_it_learns_from_the_last_steps_and_earlier_ones(ranks, tree, tmp_path):
    """Losses and rewards are transformers', on the folders that the run leaves; a share of 1/2 replays everything."""
    whole = tmp_path / "whole"
    own = tree["reward_models"]["rm"] | {"pipeline": 2, "offload": True}
    for steps, model in ((3, own), (5, tree["reward_models"]["rm"])):  # goes on in the middle of an iteration
        run = tree["run"] | {"directory": str(whole), "num_steps": steps}
        ranks(2, train, tree | {"run": run, "reward_models": {"rm": model}}, timeout=120)
    first, second = lines(whole, "reward_models.jsonl")
    assert (first["step"], first["completions"], first["replayed"]) == (2, 12, 0)
    assert (second["step"], second["completions"], second["replayed"]) == (4, 24, 12)
    folders = {0: own["path"], 2: whole / "reward_models/rm/step_2", 4: whole / "reward_models/rm/step_4"}
    for record, before, steps in ((first, 0, (1, 2)), (second, 2, (1, 2, 3, 4))):
        rows = rows_of(whole, *steps)
        scores = scoring.by_transformers(folders[before], [(row["prompt"], row["text"]) for row in rows])[:, 0].double()
        labels = torch.tensor([value(row, "even") for row in rows], dtype=torch.float64)
        assert 0 < labels.mean() < 1
        loss, metrics = label_loss(scores, labels)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["accuracy"] == pytest.approx(metrics["accuracy"].value())
    learned, _ = label_loss(
        scoring.by_transformers(folders[4], [(row["prompt"], row["text"]) for row in rows])[:, 0].double(), labels
    )
    assert learned < second["loss"] - 1e-3  # an update of all of them at once
    for began, steps in ((0, (1, 2)), (2, (3, 4)), (4, (5,))):
        rows = rows_of(whole, *steps)
        wanted = scoring.by_transformers(folders[began], [(row["prompt"], row["text"]) for row in rows])[:, 0]
        assert [value(row, "judge") for row in rows] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_iterations():
    """At a boundary the model is about to be trained, from what it was before."""
    assert [_iteration(step, 2) for step in range(7)] == [0, 0, 0, 2, 2, 4, 4]
    assert [_iteration(step, 1) for step in range(4)] == [0, 0, 1, 2]


def test_what_is_no_label_is_refused(tmp_path):
    import pyarrow as pa

    row = {"prompt_index": 0, "messages": "[]", "text": "", "rewards": [{"name": "short", "value": -0.5}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "step_000001.parquet")
    with pytest.raises(RewardError, match=r"the part short gave -0\.5 for a completion of step 1, and train\.labels"):
        _rows(tmp_path, 1, "short")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"train": {"labels": "judge", "every": 2}},
            "reward_models.rm.train.labels=judge is no part of the reward whose",
        ),
        ({"train": {"labels": "evn", "every": 2}}, "function judges whole completions; did you mean 'even'?"),
        ({"train": {"labels": "even"}}, "reward_models.rm.train.every is missing and has no default"),
        ({"train": {"labels": "even", "every": 1, "replay": 1.0}}, "reward_models.rm.train.replay=1.0 should be less"),
        ({"separator": "+"}, "reward_models.rm: train and separator are both given"),
    ],
)
def test_mistakes(tree, change, sentence):
    with pytest.raises(ConfigError) as caught:
        validate_recipe(tree | {"reward_models": {"rm": tree["reward_models"]["rm"] | change}})
    assert sentence in str(caught.value)
