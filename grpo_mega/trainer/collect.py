"""The step's groups: sampled and scored, or demonstrated; gathered, and on disk. Groups that teach nothing can be
replaced by new prompts'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.data.advantages import with_advantages
from grpo_mega.parallel import collectives
from grpo_mega.trainer.records import is_degenerate_group, write_together
from grpo_mega.trainer.setup import Run
from grpo_mega.types import Group, Rollout


@dataclass(frozen=True)
class Collected:
    """trained: the groups of the step's loss, with advantages, in global order; sampled: these and the others."""

    trained: list[Group]
    sampled: list[Group]


def collect(run: Run, step: int) -> Collected:
    """Sample and score the step's groups, the same answer on every rank; rollouts are on disk when this returns.

    DAPO's dynamic sampling (arXiv:2503.14476, section 3.2) under grpo.max_resamples: groups of equal rewards (and those
    of which nothing counts) make room for those of further prompts, a round of batch.prompts_per_step at a time. Diff
    from the paper: the rounds are bounded; where the bound is met, the first of these groups fill the step up (and
    teach nothing), so that a minibatch never shrinks. Groups beyond the step's size are dropped, the latest prompts'
    first.
    """
    recipe = run.recipe
    wanted, rounds = recipe.batch.prompts_per_step, 1 + recipe.grpo.max_resamples
    useful, spare = list[Group](), list[Group]()
    for _ in range(rounds):
        for group in _round(run, step, wanted):
            teaches = not is_degenerate_group(group) and any(rollout.counts for rollout in group.rollouts)
            (useful if teaches or rounds == 1 else spare).append(group)
        if len(useful) >= wanted:  # the same on every rank, since all of them have all groups
            break
    trained = _ordered([*useful, *spare][:wanted])
    trained = with_advantages(trained, recipe.grpo)
    chosen = {group.prompt.index for group in trained}
    others = [group for group in (*useful, *spare) if group.prompt.index not in chosen]
    sampled = _ordered([*trained, *others])
    write_together(run.mesh, lambda: run.inputs.directory.write_rollouts(step + 1, sampled))
    return Collected(trained, sampled)


def _round(run: Run, step: int, count: int) -> list[Group]:
    """The groups of the next `count` prompts, all replicas', on every rank."""
    progress, mesh = run.progress, run.mesh
    prompts = run.inputs.prompts.next(count)
    mine = mesh.share(len(prompts))
    groups: Sequence[Group]
    if run.recipe.sampling.source == "data":  # known already: it takes no time, and no reward is asked for
        completions = run.sampler.sample(prompts, mine, run.recipe.grpo.group_size, step)
        groups = [Group(prompts[i], (Rollout(one, 1.0),)) for i, (one,) in zip(mine, completions, strict=True)]
    else:
        with progress.phase("sample"):
            completions = run.sampler.sample(prompts, mine, run.recipe.grpo.group_size, step)
        with progress.phase("reward"):
            groups = run.scoring([prompts[i] for i in mine], completions)
    with progress.phase("gather"):  # where a replica that is done early waits for the others
        shares = collectives.gather_objects(list(groups), mesh.data.group)
    return _ordered([group for share in shares for group in share])


def _ordered(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group.prompt.index)
