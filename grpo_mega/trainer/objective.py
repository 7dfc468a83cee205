"""The recipe's loss, as the policy's updates call it; and its coefficient that follows the entropy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from grpo_mega.config import GrpoConfig, Recipe
from grpo_mega.objective.entropy import EntropyControl
from grpo_mega.objective.grpo import Terms, grpo_loss
from grpo_mega.trainer.policy import Objective, WholeSequences


def terms_of(grpo: GrpoConfig, entropy_coef: float) -> Terms:
    return Terms(
        ratio=grpo.ratio,
        surrogate=grpo.surrogate,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        dual_clip=grpo.dual_clip,
        tau_positive=grpo.sapo_tau_positive,
        tau_negative=grpo.sapo_tau_negative,
        kl_coef=grpo.kl_coef if grpo.kl_in == "loss" else 0.0,
        kl_estimator=grpo.kl_estimator,
        kl_unbiased=grpo.kl_unbiased,
        entropy_coef=entropy_coef,
        correction=grpo.correction,
        correction_level=grpo.correction_level,
        correction_low=grpo.correction_low,
        correction_high=grpo.correction_high,
        off_policy_threshold=grpo.off_policy_threshold,
    )


def objective_of(recipe: Recipe, entropy_coef: float | None = None) -> Objective:
    """The loss as a function of log-probs, entropies and the tokens' weights and advantages.

    entropy_coef: of this step; default: the recipe's.
    """
    terms = terms_of(recipe.grpo, recipe.grpo.entropy_coef if entropy_coef is None else entropy_coef)
    terms = replace(terms, sampled=recipe.sampling.source == "policy")
    loss = partial(grpo_loss, terms=terms)
    return WholeSequences(loss) if terms.needs_sequences else loss


class StepObjective:
    """The loss of the step at hand. Every rank has the same one, since what it follows is what all ranks measured."""

    def __init__(self, recipe: Recipe):
        grpo, self._recipe, self._control = recipe.grpo, recipe, None
        if grpo.entropy_target is not None:
            self._control = EntropyControl(grpo.entropy_coef, grpo.entropy_target, grpo.entropy_delta)

    @property
    def entropy_coef(self) -> float | None:
        """Of this step, where it follows a target."""
        return None if self._control is None else self._control.in_loss

    def now(self) -> Objective:
        """This step's loss."""
        return objective_of(self._recipe, self.entropy_coef)

    def observe(self, entropy: float) -> None:
        """The mean entropy of the step that ends, over all ranks."""
        if self._control is not None:
            self._control = self._control.after(entropy)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        control = self._control
        return {} if control is None else {"entropy_coef": control.coef, "entropy": control.entropy}

    def restore(self, state: dict[str, Any]) -> None:
        if (control := self._control) is not None and state:
            self._control = EntropyControl(state["entropy_coef"], control.target, control.delta, state["entropy"])
