"""Which rank trains on what, in microbatches of which shape. Losses and gradients: test_batches_invariance.py."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_mega.config import GrpoConfig, validate_recipe
from grpo_mega.data.advantages import with_advantages
from grpo_mega.data.balance import bundle_work, distribute, first_fit, imbalance, microbatch_work, partition
from grpo_mega.data.packing import bundle_rows, bundles
from grpo_mega.data.samples import samples_from
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families import llama
from grpo_mega.parallel import collectives, mesh
from grpo_mega.parallel.mesh import Axis
from grpo_mega.trainer.batches import equalize, minibatches, pair_cost_of, training_share
from grpo_mega.types import Completion, Group, Prompt, Rollout, Sample

SMOLLM2_135M = Architecture(
    family=llama.FAMILY,
    folder=Path(), hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=1536,
    vocab_size=49152, tied_embeddings=True, norm_eps=1e-5, context_length=8192, raw={},
)  # fmt: skip
LONGEST = 8192


def group(index, prompt, lengths, rewards=(0.0, 1.0)):
    """Completions of the given lengths; their rewards alternate."""
    rollouts = [
        Rollout(Completion((1,) * n, (-1.0,) * n, "stop"), rewards[i % len(rewards)]) for i, n in enumerate(lengths)
    ]
    made = Group(Prompt(index, "", (2,) * prompt), tuple(rollouts))
    return with_advantages([made], GrpoConfig())[0]


def recipe_of(groups, *, kl_coef=0.1, parallel=None, **batch):
    return validate_recipe(
        {
            "model": {"path": "unused"},
            "parallel": parallel or {},
            "data": {"jsonl": "unused"},
            "sampling": {"max_completion_tokens": LONGEST},
            "grpo": {"group_size": len(groups[0].rollouts), "kl_coef": kl_coef},
            "batch": {"prompts_per_step": len(groups), **batch},
            "run": {"directory": "unused"},
        }
    )


def rank_of(data, size, tensor=1, context=1, pipeline=1, virtual=1):
    """As much of a mesh as can be asked without a process group."""
    axes = {"tensor": tensor, "context": context, "pipeline": pipeline}
    return SimpleNamespace(
        data=Axis(None, data, size),
        **{name: Axis(None, 0, length) for name, length in axes.items()},
        virtual=virtual,
        device=torch.device("cpu"),
    )


def shares(groups, recipe, size, pair_cost):
    return [training_share(groups, recipe, rank_of(rank, size), pair_cost) for rank in range(size)]


def test_cost_of_a_pair_by_hand():
    arch = Architecture(
        family=llama.FAMILY,
        folder=Path(), hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=3, ffn_size=5,
        vocab_size=7, tied_embeddings=False, norm_eps=1e-5, context_length=8, raw={},
    )  # fmt: skip
    layer = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5  # query, key and value, output, feed-forward
    assert pair_cost_of(arch) == (2 + 2) * 3 * 2 / (2 * layer + 2 * 4 * 7 / 2)


# ---- ranks


def test_groups_go_where_there_is_least_work():
    # one prompt token: work is the completions' rows, and 0.1 for each pair
    groups = [group(i, 1, lengths) for i, lengths in enumerate([(9, 9), (4, 4), (6, 6), (2, 2), (9, 9), (1, 1)])]
    recipe = recipe_of(groups, minibatches=2)
    # 27, 10 and 16.2 | 4.6, 27 and 2.2: the two minibatches one by one
    assert shares(groups, recipe, 2, 0.1) == [[0, 4], [1, 2, 3, 5]]
    assert shares(groups, recipe, 1, 0.1) == [[0, 1, 2, 3, 4, 5]]
    assert shares(groups, recipe, 4, 0.1) == [[0, 4], [2, 3], [1, 5], []]  # a rank may have nothing


@pytest.mark.parametrize(("kl_coef", "expected"), [(0.0, [[3], [0, 1, 2]]), (0.1, [[0, 3], [1, 2]])])
def test_what_is_not_trained_on_is_no_work(kl_coef, expected):
    """Two long groups that teach nothing: only a KL term has them trained on."""
    groups = [group(i, 1, (90, 90), (1.0,)) for i in range(2)] + [group(2, 1, (5, 5)), group(3, 1, (6, 6))]
    assert shares(groups, recipe_of(groups, kl_coef=kl_coef), 2, 0.0) == expected


def test_completions_that_do_not_count_are_no_work():
    groups = [group(0, 1, (80, 2)), group(1, 1, (3, 4)), group(2, 1, (2, 4))]
    assert shares(groups, recipe_of(groups), 2, 0.0) == [[0], [1, 2]]
    cut = replace(groups[0].rollouts[0], counts=False)
    groups[0] = replace(groups[0], rollouts=(cut, groups[0].rollouts[1]))
    assert shares(groups, recipe_of(groups), 2, 0.0) == [[1], [0, 2]]  # 7 | 6 + 2


def long_tailed(prompts, seed):
    """Groups of 8 completions, log-normal: half are below 500 tokens, one in 100 is above 6000."""
    rng = random.Random(seed)
    return [
        group(i, rng.randint(50, 250), [max(1, min(LONGEST, int(rng.lognormvariate(6.2, 1.1)))) for _ in range(8)])
        for i in range(prompts)
    ]


def by_rows(units, count, capacity):
    """Whole bundles in bins of nearly equal rows: what there was before work was counted."""
    parts = partition([bundle_rows(unit) for unit in units], count)
    return [[units[i] for i in part] for part in parts]


def imbalances(groups, places, capacity, pair_cost, fill_bins):
    """(over ranks, over microbatches) when each rank trains on the groups at its places."""
    units = []
    for mine in places:
        samples, _ = samples_from(
            [groups[i] for i in mine], mine, normalization="sequence", max_completion_tokens=LONGEST
        )
        units.append(bundles(samples, capacity))
    count = max(len(first_fit([bundle_rows(unit) for unit in several], capacity)) for several in units)
    bins = [fill_bins(several, count, capacity) for several in units]
    return imbalance([[[sum(bundle_work(unit, pair_cost) for unit in bin) for bin in parts]] for parts in bins])


def long_tail_before_and_after():
    """SmolLM2-135M's costs, 64 prompts x 8 completions on 8 ranks, in microbatches of 16384 rows; means of five steps.

    ((over ranks, over microbatches) by place and rows, the same by work)
    """
    pair_cost, capacity, found = pair_cost_of(SMOLLM2_135M), 2 * LONGEST, []
    for seed in range(5):
        groups = long_tailed(64, seed)
        by_place = [range(rank, 64, 8) for rank in range(8)]
        by_work = shares(groups, recipe_of(groups, tokens_per_microbatch=capacity), 8, pair_cost)
        assert sorted(i for places in by_work for i in places) == list(range(64))
        found.append(
            (
                imbalances(groups, by_place, capacity, pair_cost, by_rows),
                imbalances(groups, by_work, capacity, pair_cost, partial(distribute, pair_cost=pair_cost)),
            )
        )
    return torch.tensor(found).mean(dim=0).tolist()


def test_a_long_tail_is_balanced():
    (ranks_before, microbatches_before), (ranks_after, microbatches_after) = long_tail_before_and_after()
    assert ranks_before == pytest.approx(1.33, abs=0.005) and ranks_after < 1.02
    assert microbatches_before == pytest.approx(1.83, abs=0.005) and microbatches_after < 1.15


# ---- microbatches


def sample(order, rows):
    """Of one prompt token, alone in its group."""
    return Sample(order, order, 1, (1,) * (rows + 1), (False,) + (True,) * rows, (0.0,) * (rows + 1), 1.0, 1.0)


@pytest.mark.parametrize(
    ("lengths", "free", "fixed"),  # rows of each microbatch, of a capacity of 10 and a multiple of 4
    [
        ([3, 2], [8], [12]),
        ([], [4], [12]),
        ([6, 5, 4], [12, 12], [12, 12]),  # 6 | 5 4
        ([10, 3, 3, 3], [12, 12], [12, 12]),
        ([4, 4, 4], [8, 8], [12, 12]),
        ([13, 2], [16, 16], [16, 16]),  # only a single sequence exceeds it
    ],
)
def test_fixed_rows(lengths, free, fixed):
    samples = [sample(i, n) for i, n in enumerate(lengths)]
    for flag, expected in ((False, free), (True, fixed)):
        batches = equalize(samples, 1, 10, rank_of(0, 1, tensor=4), torch.float64, fixed=flag)
        assert [batch.rows for batch in batches] == expected
        assert sum(int(batch.cu_seqlens[-1]) for batch in batches) == sum(lengths)
        for batch in batches:  # w R / D, whatever R is
            weights = batch.loss_weights[batch.loss_weights != 0]
            assert (weights == sum(expected)).all()


@pytest.mark.parametrize(
    ("mesh", "count", "rows"),  # of 3 sequences of 5 rows, 5 rows a microbatch
    [
        ({}, 3, 5),
        ({"tensor": 2}, 3, 6),
        ({"context": 2}, 3, 8),  # two runs a rank
        ({"tensor": 3, "context": 2}, 3, 12),
        ({"pipeline": 2}, 3, 5),
        ({"pipeline": 2, "virtual": 2}, 4, 5),  # whole rounds
    ],
)
def test_what_a_mesh_can_divide(mesh, count, rows):
    batches = equalize([sample(i, 5) for i in range(3)], 1, 5, rank_of(0, 1, **mesh), torch.float64)
    assert [batch.rows for batch in batches] == [rows] * count
    assert {w for batch in batches for w in batch.loss_weights.tolist()} - {0.0} == {float(count * rows)}


def test_fixed_rows_of_the_recipe():
    groups = [group(i, 2, (3, 4)) for i in range(2)]
    for fixed, rows in ((False, 16), (True, 100)):
        recipe = recipe_of(groups, tokens_per_microbatch=100, fixed_rows=fixed)
        ((batch,),) = minibatches(groups, [0, 1], recipe, rank_of(0, 1), torch.float32)
        assert batch.rows == rows


def on_two_ranks(kl_coef):
    """(shape of each microbatch, orders of groups, work of each microbatch) of each rank, and the step's imbalances."""
    grid = mesh.initialize()
    groups = [group(i, 1, (n, n + 1)) for i, n in enumerate((30, 3, 4, 5, 8, 7, 6, 9))]
    recipe = recipe_of(groups, minibatches=2, tokens_per_microbatch=20, kl_coef=kl_coef)
    mine = training_share(groups, recipe, grid, 0.1)
    parts = minibatches([groups[i] for i in mine], mine, recipe, grid, torch.float32, 0.1)
    work = [[microbatch_work(batch, 0.1) for batch in part] for part in parts]
    both = collectives.gather_objects(work, grid.data.group)
    return mine, [[batch.rows for batch in part] for part in parts], work, imbalance(both)


def test_ranks_agree_on_number_and_rows(ranks):
    (first, rows, work, found), (second, other_rows, other_work, same) = ranks(2, on_two_ranks, 0.0)
    assert sorted(first + second) == list(range(8)) and rows == other_rows and found == same
    assert len({n for part in rows for n in part[:1]}) == 2 and all(len(set(part)) == 1 for part in rows)
    totals = [[sum(part) for part in several] for several in (work, other_work)]
    # 30 31 are alone of their minibatch on one rank, more than all the rest of it
    assert totals[0][0] == pytest.approx(61 + 0.1 * (465 + 496)) and totals[0][0] > totals[1][0]
    mean = sum(map(sum, totals)) / 2
    assert found[0] == pytest.approx(sum(map(max, zip(*totals, strict=True))) / mean)


if __name__ == "__main__":
    print(long_tail_before_and_after())
