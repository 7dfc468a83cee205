"""GRPO, arXiv:2402.03300, algorithm 1: the page that everything else serves.

It never compares a rank: layouts, precision, samplers and the variants of the method live behind the parts that it puts
to work. Outer iterations are `refresh_reference`'s and `train_reward_models`'; steps are the paper's inner ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grpo_mega.data.balance import microbatch_work
from grpo_mega.parallel import collectives
from grpo_mega.parallel.device import peak_memory_bytes
from grpo_mega.rewards.score import first_fault, unscored_steps
from grpo_mega.trainer import checkpoint
from grpo_mega.trainer.batches import minibatches, pair_cost_of, training_share, with_logprobs
from grpo_mega.trainer.collect import Collected, collect
from grpo_mega.trainer.evaluation import evaluate
from grpo_mega.trainer.iterations import refresh_reference
from grpo_mega.trainer.penalty import penalised
from grpo_mega.trainer.records import StepCost, group_metrics, step_timings, write_together
from grpo_mega.trainer.reward_replay import train_reward_models
from grpo_mega.trainer.setup import Run
from grpo_mega.types import Mean, Metrics, Microbatch, add_metrics


def train(run: Run, start: int = 0) -> None:
    """Run the recipe's steps from `start` on; every rank calls, the writing rank records."""
    recipe, mesh, progress, policy = run.recipe, run.mesh, run.progress, run.policy
    steps, grpo, mu = recipe.run.num_steps, recipe.grpo, recipe.grpo.num_iterations
    unscored, pair_cost = 0, pair_cost_of(run.inputs.arch)
    for step in range(start, steps):
        refresh_reference(run, step)
        train_reward_models(run, step)
        progress.begin_step(step + 1, steps)
        groups = collect(run, step)
        metrics = step_metrics(run, step, groups)
        unscored = unscored_steps(groups.sampled, unscored)  # ends the run, on every rank alike
        with progress.phase("log-probs"):
            mine = training_share(groups.trained, recipe, mesh, pair_cost)  # whoever sampled them
            own = [groups.trained[i] for i in mine]
            parts = minibatches(own, mine, recipe, mesh, policy.dtype, pair_cost)
            parts = [logprobs_of(run, batches, on_policy=mu == len(parts) == 1) for batches in parts]
            if grpo.kl_coef and grpo.kl_in == "reward":
                parts = penalised(groups.trained, parts, recipe, mesh)
        with progress.phase("update"):
            policy.begin_step()
            objective = run.objective.now()
            for _ in range(mu):
                for batches in parts:
                    metrics = add_metrics(metrics, policy.update(batches, objective, progress.tick))
        work = [[microbatch_work(batch, pair_cost) for batch in batches] for batches in parts]
        record_step(run, step, groups, metrics, work)
        if step + 1 == steps or (recipe.run.save_every and (step + 1) % recipe.run.save_every == 0):
            save(run, step + 1)
        every = recipe.run.evaluate_every
        if every and (step + 1) % every == 0 and step + 1 < steps and run.inputs.heldout:
            evaluate(run, step + 1)


def logprobs_of(run: Run, batches: Sequence[Microbatch], *, on_policy: bool) -> list[Microbatch]:
    """Attach what the objective compares with: old log-probs unless old is current by definition, reference for KL.

    on_policy: the step's one update is by the policy that it begins with.
    """
    recipe, grpo, nothing = run.recipe, run.recipe.grpo, [None] * len(batches)
    old: Sequence[Tensor | None] = nothing
    if grpo.old_logprobs == "sampler":
        old = [batch.sampler_logprobs for batch in batches]
    elif grpo.old_logprobs == "policy" and not on_policy and (grpo.needs_old or recipe.moe.routing_replay):
        old = run.policy.logprobs(batches, run.progress.tick)
    ref = nothing if run.reference is None else run.reference.logprobs(batches, run.progress.tick)
    return with_logprobs(batches, old, ref)


def step_metrics(run: Run, step: int, groups: Collected) -> Metrics:
    """What was sampled and scored; faults of the reward are said aloud. Of demonstrations, how long they are."""
    metrics = group_metrics(groups.sampled)
    if "reward" not in metrics:
        return metrics
    if errors := int(metrics["reward_errors"].total):
        run.progress.say(f"step {step + 1}: the reward failed for {errors} completions, {first_fault(groups.sampled)}")
    run.progress.note(f"reward {metrics['reward'].value():.3f}")
    return metrics


def record_step(run: Run, step: int, groups: Collected, metrics: Metrics, work: Sequence[Sequence[float]]) -> None:
    """Sum what the last stages measured; write metrics (deterministic) and timings, and show them.

    work: of this rank's microbatches of each minibatch, in rows.
    """
    mesh, progress = run.mesh, run.progress
    of_groups = group_metrics(groups.sampled)
    measured = {k: Mean(float(m.total), float(m.count)) for k, m in metrics.items() if k not in of_groups}
    total = add_metrics(*collectives.gather_objects(measured if mesh.tensor.first else {}, mesh.world.group), of_groups)
    values = {key: total[key].value() for key in sorted(total)}
    cost = StepCost(progress.seconds.get("sample", 0.0), progress.cpu_seconds(), peak_memory_bytes(mesh.device), work)
    costs, tokens = collectives.gather_objects(cost, mesh.world.group), int(of_groups["completion_tokens"].total)
    trained = sum(len(one.completion.token_ids) for group in groups.trained for one in group.rollouts)
    timings = step_timings(progress.seconds, progress.step_seconds(), costs, tokens, trained)
    values = {"lr": run.policy.learning_rate, **values}
    if run.recipe.grpo.max_resamples:
        values["resampled_groups"] = len(groups.sampled) - len(groups.trained)
    if run.objective.entropy_coef is not None:
        values["entropy_coef"] = run.objective.entropy_coef
        if values["entropy"] == values["entropy"]:  # nan: no token was trained
            run.objective.observe(values["entropy"])
    write_together(mesh, lambda: run.inputs.directory.write_step(step + 1, values, timings))
    progress.end_step(values, timings)


def save(run: Run, steps_done: int) -> None:
    """Checkpoint: `steps_done` steps are in it."""
    with run.progress.task("checkpoint"):
        layout = {axis: size for axis, size in run.recipe.parallel.sizes.items() if size}
        state = {
            "step": steps_done,
            "prompts": run.inputs.prompts.state(),
            "layout": layout,
            "objective": run.objective.state(),
        }
        checkpoint.save(run.inputs.directory.checkpoints, steps_done, run.policy, state, run.mesh, run.inputs.arch)
