"""What a policy makes of held-out problems: pass@k, maj@k, rewards and lengths, each with its 95 % interval.

The same in the training loop and alone (`trainer/standalone.py`): problems are shared over data ranks, sampled, scored
and judged there, and come back to every rank in the problems' order, so that no layout changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from grpo_mega.config import Recipe
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.rewards.estimates import Estimate, majority_at_k, mean_estimate, pass_at_k, share_estimate
from grpo_mega.rewards.resolve import Part
from grpo_mega.rewards.score import Outcome, asked_about, first_fault, score_groups
from grpo_mega.rewards.steps import Marks
from grpo_mega.rewards.votes import Verdict, judge, voter
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.trainer.lines import bracketed
from grpo_mega.trainer.records import write_together
from grpo_mega.trainer.reward_model import RewardModel
from grpo_mega.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from grpo_mega.trainer.setup import Run


@dataclass(frozen=True)
class Examination:
    """Who is asked what: `prompts` are the held-out problems, alike on every rank."""

    recipe: Recipe
    prompts: Sequence[Prompt]
    reward: Sequence[Part]
    decode: Callable[[Sequence[int]], str]
    sampler: Sampler
    mesh: Mesh
    reward_models: Mapping[str, RewardModel] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What came out; the same on every rank. groups and verdicts: of each problem, in their order."""

    step: int
    estimates: dict[str, Estimate]
    groups: Sequence[Group]
    verdicts: Sequence[Verdict]

    @property
    def counts(self) -> dict[str, int]:
        """Problems, completions of each, completions whose reward failed, and draws that rounding could have turned."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        return {
            "problems": len(self.groups),
            "completions": len(self.groups[0].rollouts),
            "reward_errors": sum(rollout.error is not None for rollout in rollouts),
            "near_boundary_draws": sum(rollout.completion.near_boundary for rollout in rollouts),
        }

    def record(self) -> dict[str, float]:
        """A line of evaluations.jsonl: of each metric NAME its mean, and NAME_low and NAME_high; then the counts."""
        ends = ({name: of.mean, f"{name}_low": of.low, f"{name}_high": of.high} for name, of in self.estimates.items())
        return {key: value for several in ends for key, value in several.items()} | self.counts

    def line(self) -> str:
        """For a person who reads along."""
        counts = self.counts
        shown = (f"{name} {bracketed(of.mean, of.low, of.high)}" for name, of in self.headlines().items())
        errors = counts["reward_errors"]
        faults = f"; {errors} errors, {first_fault(self.groups)}" if errors else ""
        return f"{', '.join(shown)}; {counts['problems']} problems x {counts['completions']} completions{faults}"

    def headlines(self) -> dict[str, Estimate]:
        """What says how good the policy is: the reward, pass@k and maj@k."""
        return {name: of for name, of in self.estimates.items() if name == "reward" or "@" in name}


def examine(exam: Examination, step: int) -> Evaluation:
    """Sample, score and judge. Every rank must call; `step` keys the noise, beside each prompt's negative index."""
    prompts, mesh, count = exam.prompts, exam.mesh, exam.recipe.evaluation.completions
    mine = mesh.share(len(prompts))
    sampled = exam.sampler.sample(prompts, mine, count, step)
    problems, reward = [prompts[i] for i in mine], exam.recipe.reward
    marks = None if reward.steps is None else Marks(exam.decode, **reward.steps.marks)
    asked = asked_about(problems, sampled, reward.truncated, marks) if exam.reward_models else []
    given = {name: model.outcomes(asked) for name, model in exam.reward_models.items()}  # by all ranks together
    own = _judged(exam, problems, sampled, marks, given) if mesh.leads_replica else None
    own = collectives.broadcast_object(collectives.broadcast_object(own, mesh.replica.group), mesh.context.group)
    everything = [pair for share in collectives.gather_objects(own, mesh.data.group) for pair in share]
    everything.sort(key=lambda pair: -pair[0].prompt.index)
    groups, verdicts = [group for group, _ in everything], [verdict for _, verdict in everything]
    return Evaluation(step, estimates_of(groups, verdicts, exam.recipe), groups, verdicts)


def _judged(
    exam: Examination,
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    marks: Marks | None,
    given: Mapping[str, Sequence[Outcome]],
) -> list[tuple[Group, Verdict]]:
    """This replica's groups and what is to be thought of them; asked for once a completion, by one rank."""
    reward, rule = exam.recipe.reward, exam.recipe.evaluation
    bare = [[replace(completion, kept=None) for completion in several] for several in sampled]
    groups = score_groups(
        prompts,
        bare,
        exam.reward,
        truncated=reward.truncated,
        truncation_reward=reward.truncation_reward,
        marks=marks,
        given=given,
    )
    name = rule.correct_part(reward)
    vote = voter(reward.all_parts[name]) if rule.maj_at and name is not None else None
    return [(group, judge(group, name, vote)) for group in groups]


def estimates_of(groups: Sequence[Group], verdicts: Sequence[Verdict], recipe: Recipe) -> dict[str, Estimate]:
    """Each metric's mean over problems: reward; pass@k; maj@k; completion_tokens; truncated, the share that was cut.

    Means over the completions of a problem are the means of all completions, since every problem has equally many.
    """
    rollouts = [group.rollouts for group in groups]
    draws = sum(map(len, rollouts))

    def means(values: Sequence[Sequence[float]]) -> list[float]:
        return [sum(of_problem) / len(of_problem) for of_problem in values]

    estimates = {"reward": mean_estimate(means([[rollout.reward for rollout in of] for of in rollouts]))}
    counts = [verdict.counts for verdict in verdicts]
    for k in recipe.evaluation.pass_at:
        passed = [pass_at_k(correct + sum(others) + silent, correct, k) for correct, others, silent in counts]
        estimates[f"pass@{k}"] = share_estimate(passed, draws)
    for k in recipe.evaluation.maj_at:
        estimates[f"maj@{k}"] = share_estimate([majority_at_k(*of, k) for of in counts], draws)
    completions = [[rollout.completion for rollout in of] for of in rollouts]
    estimates["completion_tokens"] = mean_estimate(means([[len(c.token_ids) for c in of] for of in completions]))
    cut = means([[c.finish_reason == "length" for c in of] for of in completions])
    return estimates | {"truncated": share_estimate(cut, draws)}


def evaluate(run: Run, steps_done: int) -> Evaluation:
    """Examine a run's policy on its held-out problems and record what came out. Every rank must call."""
    inputs, decode = run.inputs, run.inputs.tokenizer.decode
    exam = Examination(run.recipe, inputs.heldout, inputs.reward, decode, run.examiner, run.mesh, run.reward_models)
    with run.progress.task("held-out accuracy", f" after {steps_done} steps") as task:
        evaluation = examine(exam, steps_done)
        task.result = evaluation.line()
    record: dict[str, Any] = evaluation.record()
    write_together(run.mesh, lambda: run.inputs.directory.write_evaluation(steps_done, record))
    return evaluation
