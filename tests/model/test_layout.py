"""Which stage holds which layers: the cheapest most expensive stage, for any number of layers."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import tiny

from grpo_mega.config import ParallelConfig
from grpo_mega.errors import ConfigError
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import first_layer, layers_per_stage


def model(layers, head):
    """A model whose output head costs as much as `head` decoder layers."""
    return SimpleNamespace(num_layers=layers, head_parameters=head * 1000, layer_parameters=1000)


def dearest(counts, head):
    """The cost of the most expensive stage, in decoder layers."""
    costs = list(map(float, counts))
    costs[0] += head / 20
    costs[-1] += head
    return max(costs)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "wanted"),
    [
        (30, 1, 8.0, (30,)),
        (30, 2, 0.0, (15, 15)),
        (30, 2, 8.0, (19, 11)),  # 19.4 against 19: SmolLM2-135M's head costs eight of its layers
        (94, 4, 0.0, (24, 24, 23, 23)),
        (61, 8, 1.5, (7, 8, 8, 8, 8, 8, 8, 6)),
        (4, 4, 100.0, (1, 1, 1, 1)),
    ],
)
def test_splits_by_hand(layers, stages, head, wanted):
    assert layers_per_stage(model(layers, head), stages) == wanted


@pytest.mark.parametrize("head", [0.0, 0.3, 2.0, 7.7, 40.0])
@pytest.mark.parametrize("layers", [5, 8, 11])
def test_no_other_split_is_better(layers, head):
    for stages in range(1, 5):
        found = layers_per_stage(model(layers, head), stages)
        every = (c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers)
        assert sum(found) == layers and len(found) == stages and min(found) >= 1
        assert dearest(found, head) == pytest.approx(min(dearest(counts, head) for counts in every))


def test_a_given_layout_is_taken_as_it_is():
    assert layers_per_stage(model(5, 2.0), 3, (1, 3, 1)) == (1, 3, 1)
    assert [first_layer((1, 3, 1), stage) for stage in range(3)] == [0, 1, 4]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((2, 2), "[2, 2] holds 4 layers but the model has 5; make them add up, or leave it out for [3, 2]"),
        ((5, 0), "[5, 0] has an empty stage; give each at least 1 layer"),
    ],
)
def test_layouts_that_are_refused(given, words):
    with pytest.raises(ConfigError, match=re.escape("parallel.pipeline_layout=" + words)):
        layers_per_stage(model(5, 1.0), 2, given)


@pytest.mark.parametrize(
    ("asked", "world", "refusal", "near"),
    [  # a model of 5 layers, 12 heads, 6 key-value heads
        ({"tensor": 8}, 8, "parallel.tensor=8 does not divide the model's 12 attention heads", "tensor 2, "),
        ({"tensor": 4}, 6, "parallel.tensor=4 does not divide", "tensor 3, tensor 6, "),
        ({"pipeline": 8}, 8, "parallel.pipeline=8 exceeds the model's 5 layers; use at most 5", "pipeline 4, "),
        ({"pipeline": 4, "virtual_pipeline": 2}, 4,
         "parallel.pipeline=4 x parallel.virtual_pipeline=2 exceeds the model's 5 layers; use at most 5 together",
         "pipeline 2 x virtual_pipeline 2, "),
        ({"context": 4}, 6, "6 ranks do not divide into replicas of parallel.tensor=1 x parallel.pipeline=1 x "
         "parallel.context=4 = 4 ranks; start 4 ranks or a multiple, or change the layout", "context 3, context 6, "),
        ({"pipeline": 2}, 3, "3 ranks do not divide into replicas of ", "pipeline 3, no cut at all, "),
    ],
)  # fmt: skip
def test_a_refusal_names_the_nearest_that_fit(tmp_path_factory, asked, world, refusal, near):
    from grpo_mega.trainer.check import check_parallel

    arch = read_architecture(tiny.make_model(tmp_path_factory.mktemp("nearest") / "model"))
    with pytest.raises(ConfigError) as caught:
        check_parallel(arch, ParallelConfig(**asked), world)
    words = str(caught.value)
    assert words.startswith(refusal) and f"; nearest on {world} ranks: {near}" in words, words
    for layout in words.partition(f"nearest on {world} ranks: ")[2].split(", "):  # and they do
        sizes = {} if layout == "no cut at all" else dict(axis.split() for axis in layout.split(" x "))
        check_parallel(arch, ParallelConfig(**{axis: int(size) for axis, size in sizes.items()}), world)
