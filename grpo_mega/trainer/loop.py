"""GRPO, arXiv:2402.03300, algorithm 1 with one outer iteration: the page that everything else serves.

It never compares a rank: layouts, precision and samplers live behind the parts that it puts to work.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.data.balance import microbatch_work
from grpo_mega.parallel import collectives
from grpo_mega.parallel.device import peak_memory_bytes
from grpo_mega.rewards.score import asked, first_fault, score_groups, unscored_steps
from grpo_mega.trainer import checkpoint
from grpo_mega.trainer.batches import minibatches, pair_cost_of, training_share, with_logprobs
from grpo_mega.trainer.records import StepCost, group_metrics, step_timings, write_together
from grpo_mega.trainer.setup import Run
from grpo_mega.types import Completion, Group, Mean, Metrics, Microbatch, Prompt, add_metrics

EVALUATION_COMPLETIONS = 4


def train(run: Run, start: int = 0) -> None:
    """Run the recipe's steps from `start` on; every rank calls, the writing rank records."""
    recipe, mesh, progress, policy = run.recipe, run.mesh, run.progress, run.policy
    steps, group_size, mu = recipe.run.num_steps, recipe.grpo.group_size, recipe.grpo.num_iterations
    unscored, pair_cost = 0, pair_cost_of(run.inputs.arch)
    for step in range(start, steps):
        progress.begin_step(step + 1, steps)
        prompts = run.inputs.prompts.next(recipe.batch.prompts_per_step)
        mine = mesh.share(len(prompts))
        with progress.phase("sample"):
            completions = run.sampler.sample(prompts, mine, group_size, step)
        with progress.phase("reward"):
            groups = score(run, [prompts[i] for i in mine], completions)
        with progress.phase("gather"):  # where a replica that is done early waits for the others
            everything = record_rollouts(run, step, groups)
        metrics = group_metrics(everything)
        if errors := int(metrics["reward_errors"].total):
            progress.say(f"step {step + 1}: the reward failed for {errors} completions, {first_fault(everything)}")
        progress.note(f"reward {metrics['reward'].value():.3f}")
        unscored = unscored_steps(everything, unscored)  # ends the run, on every rank alike
        with progress.phase("log-probs"):
            mine = training_share(everything, recipe, mesh, pair_cost)  # whoever sampled them
            parts = minibatches([everything[i] for i in mine], mine, recipe, mesh, policy.dtype, pair_cost)
            parts = [logprobs_of(run, batches, on_policy=mu == len(parts) == 1) for batches in parts]
        with progress.phase("update"):
            policy.begin_step()
            for _ in range(mu):
                for batches in parts:
                    metrics = add_metrics(metrics, policy.update(batches, run.objective, progress.tick))
        work = [[microbatch_work(batch, pair_cost) for batch in batches] for batches in parts]
        record_step(run, step, everything, metrics, work)
        if step + 1 == steps or (recipe.run.save_every and (step + 1) % recipe.run.save_every == 0):
            save(run, step + 1)
        every = recipe.run.evaluate_every
        if every and (step + 1) % every == 0 and step + 1 < steps and run.inputs.heldout:
            evaluate(run, step + 1)


def score(run: Run, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[Group]:
    """Rewards: of models by all ranks together, of functions once a completion (by one rank of each replica), and told
    to the replica's others."""
    groups, reward, rule = None, run.inputs.reward, run.recipe.reward
    pairs = asked(prompts, completions, rule.truncated) if run.reward_models else []
    given = {name: model.outcomes(pairs, run.progress.tick) for name, model in run.reward_models.items()}
    if run.mesh.leads_replica:
        groups = score_groups(
            prompts,
            completions,
            reward,
            truncated=rule.truncated,
            truncation_reward=rule.truncation_reward,
            given=given,
        )
    return collectives.broadcast_object(
        collectives.broadcast_object(groups, run.mesh.replica.group), run.mesh.context.group
    )


def logprobs_of(run: Run, batches: Sequence[Microbatch], *, on_policy: bool) -> list[Microbatch]:
    """Attach what the objective compares with: old log-probs unless old is current by definition, reference for KL."""
    nothing = [None] * len(batches)
    old = nothing if on_policy else run.policy.logprobs(batches, run.progress.tick)
    ref = nothing if run.reference is None else run.reference.logprobs(batches, run.progress.tick)
    return with_logprobs(batches, old, ref)


def record_rollouts(run: Run, step: int, groups: Sequence[Group]) -> list[Group]:
    """All replicas' groups in the step's global order, on every rank; on disk before the update.

    Raises RunDirectoryError, on every rank, if they cannot be written.
    """
    shares = collectives.gather_objects(list(groups), run.mesh.data.group)
    everything = sorted((group for share in shares for group in share), key=lambda group: group.prompt.index)
    write_together(run.mesh, lambda: run.inputs.directory.write_rollouts(step + 1, everything))
    return everything


def record_step(
    run: Run, step: int, groups: Sequence[Group], metrics: Metrics, work: Sequence[Sequence[float]]
) -> None:
    """Sum what the last stages measured; write metrics (deterministic) and timings, and show them.

    work: of this rank's microbatches of each minibatch, in rows.
    """
    mesh, progress = run.mesh, run.progress
    of_groups = group_metrics(groups)
    measured = {k: Mean(float(m.total), float(m.count)) for k, m in metrics.items() if k not in of_groups}
    total = add_metrics(*collectives.gather_objects(measured if mesh.tensor.first else {}, mesh.world.group), of_groups)
    values = {key: total[key].value() for key in sorted(total)}
    cost = StepCost(progress.seconds["sample"], progress.cpu_seconds(), peak_memory_bytes(mesh.device), work)
    costs, tokens = collectives.gather_objects(cost, mesh.world.group), int(of_groups["completion_tokens"].total)
    timings = step_timings(progress.seconds, progress.step_seconds(), costs, tokens)
    values = {"lr": run.policy.learning_rate, **values}
    write_together(mesh, lambda: run.inputs.directory.write_step(step + 1, values, timings))
    progress.end_step(values, timings)


def save(run: Run, steps_done: int) -> None:
    """Checkpoint: `steps_done` steps are in it."""
    with run.progress.task("checkpoint"):
        layout = {axis: size for axis, size in run.recipe.parallel.sizes.items() if size}
        state = {"step": steps_done, "prompts": run.inputs.prompts.state(), "layout": layout}
        checkpoint.save(run.inputs.directory.checkpoints, steps_done, run.policy, state, run.mesh, run.inputs.arch)


def evaluate(run: Run, steps_done: int) -> tuple[float, list[Group]]:
    """Mean reward on the held-out prompts, at the training temperature, EVALUATION_COMPLETIONS each; and the groups."""
    prompts = run.inputs.heldout
    mine = run.mesh.share(len(prompts))
    with run.progress.task("held-out accuracy", f" after {steps_done} steps") as task:
        completions = run.sampler.sample(prompts, mine, EVALUATION_COMPLETIONS, steps_done)
        shares = collectives.gather_objects(score(run, [prompts[i] for i in mine], completions), run.mesh.data.group)
        groups = sorted((g for share in shares for g in share), key=lambda group: -group.prompt.index)
        metrics = group_metrics(groups)
        reward, errors = metrics["reward"].value(), int(metrics["reward_errors"].total)
        faults = f"; {errors} errors, {first_fault(groups)}" if errors else ""
        task.result = f"{reward:.3f} ({len(groups)} problems x {EVALUATION_COMPLETIONS} completions{faults})"
    write_together(run.mesh, lambda: run.inputs.directory.write_evaluation(steps_done, reward))
    return reward, groups
