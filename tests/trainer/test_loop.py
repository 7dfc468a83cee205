"""What the objective's ratios compare with, by grpo.old_logprobs and what the step's updates need."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grpo_mega.config import validate_recipe
from grpo_mega.trainer.loop import logprobs_of
from grpo_mega.trainer.progress import Progress
from grpo_mega.types import Microbatch

SAMPLED, COMPUTED, REFERENCE = (torch.tensor([value, 0.0]) for value in (-1.0, -2.0, -3.0))


def attached(grpo, *, on_policy, **sections):
    """(old log-probs, how often the policy was asked for them) of one microbatch."""
    recipe = validate_recipe(
        {"model": {"path": "m"}, "data": {"jsonl": "d"}, "grpo": grpo, "run": {"directory": "r"}} | sections
    )
    calls = []
    policy = SimpleNamespace(logprobs=lambda batches, tick: calls.append(batches) or [COMPUTED])
    reference = SimpleNamespace(logprobs=lambda batches, tick: [REFERENCE])
    run = SimpleNamespace(recipe=recipe, policy=policy, reference=reference, progress=Progress(None))
    ids, values = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    batch = Microbatch(
        ids, ids, ids, ids, values, values, SAMPLED, torch.tensor([0, 2], dtype=torch.int32), prefixes=(-1,)
    )
    (found,) = logprobs_of(run, [batch], on_policy=on_policy)
    assert found.ref_logprobs is REFERENCE
    return found.old_logprobs, len(calls)


@pytest.mark.parametrize(
    ("grpo", "on_policy", "old", "asked"),
    [
        ({}, True, None, 0),  # the old policy is the current one by definition
        ({"num_iterations": 2}, False, COMPUTED, 1),
        ({"old_logprobs": "sampler"}, True, SAMPLED, 0),
        ({"old_logprobs": "sampler", "num_iterations": 2}, False, SAMPLED, 0),
        ({"old_logprobs": "none"}, True, None, 0),
        # maximum likelihood compares with nothing, however many updates; a KL estimate in the reward does
        ({"advantage": "best_of_n", "surrogate": "logprob", "num_iterations": 2}, False, None, 0),
        ({"advantage": "dr_grpo", "kl_in": "reward", "num_iterations": 2}, False, COMPUTED, 1),
    ],
)
def test_old_log_probs_are_the_ones_that_the_recipe_names(grpo, on_policy, old, asked):
    found, calls = attached(grpo, on_policy=on_policy)
    assert found is old and calls == asked
