"""The recipe's `grpo` section: how rewards become advantages, and which terms the loss has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from grpo_mega.config.base import NonNegative, Positive, Section

Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]

# of advantages: which of them are a group's own affair, so that each step of a completion can have one
PER_STEP = ("grpo", "dr_grpo")


class GrpoConfig(Section):
    group_size: int = 8
    # objective/advantages: (r - mean) / std; r - mean; r - mean of the others; over the batch, without and with the
    # group's mean taken off first; 1 for the best of a group and 0 for the others
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "best_of_n"
    ] = "grpo"
    # of best_of_n: how many of a group are imitated (default: 1, or all above best_above), and above which reward
    best: Positive | None = None
    best_above: float | None = None
    # objective/surrogate
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    surrogate: Literal["clip", "cispo", "sapo", "logprob"] = "clip"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2  # 1: no bound
    clip_high: Above0 = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # of clip: bound of the ratio where the advantage is below 0
    sapo_tau_positive: Above0 = 1.0
    sapo_tau_negative: Above0 = 1.05
    # what the ratio compares with: the policy at step start (computed anew where a step has several updates), what the
    # sampler said of it, or nothing: the current policy, which one update a step is by definition
    old_logprobs: Literal["policy", "sampler", "none"] = "policy"
    # objective/kl
    kl_coef: AtLeast0 = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_unbiased: bool = False  # in the loss: times the ratio, gradient included
    # objective/entropy
    entropy_coef: AtLeast0 = 0.0  # of the bonus; where a target is given, of the first step
    entropy_target: Above0 | None = None  # nats a token
    entropy_delta: Above0 = 0.0001  # by which the coefficient moves a step
    # objective/correction
    correction: Literal["none", "truncate", "mask"] = "none"  # of the difference between sampler and trainer
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    correction_low: AtLeast0 = 0.0  # of mask
    correction_high: Above0 = 2.0
    off_policy_threshold: Above0 | None = None  # nats a token; beyond it a completion of negative advantage is masked
    normalization: Literal["sequence", "group_token", "token", "constant"] = "sequence"
    num_iterations: Positive = 1  # the paper's mu
    # groups of equal rewards are replaced by groups of new prompts, in at most so many further rounds (0: kept)
    max_resamples: NonNegative = 0

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value < 1:
            raise ValueError("should be at least 1 completion a prompt (DeepSeekMath uses 64)")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        if self.group_size < 2 and self.advantage not in ("reinforce_plus_plus", "best_of_n"):
            raise ValueError(
                f"grpo.group_size={self.group_size} leaves nothing to compare a completion with: the standard "
                "deviation of a group of one is undefined; use 2 or more (DeepSeekMath uses 64)"
            )
        self._unused()
        if self.kl_coef and self.kl_estimator == "k1" and self.kl_in == "loss" and not self.kl_unbiased:
            raise ValueError(
                "grpo.kl_estimator=k1 in the loss penalises nothing: its gradient is zero in expectation; set "
                "grpo.kl_in=reward, or grpo.kl_unbiased=true, or use k2 or k3"
            )
        if self.kl_in == "reward" and self.advantage in ("grpo", "best_of_n"):
            raise ValueError(
                f"grpo.kl_in=reward with grpo.advantage={self.advantage}: in a group of equal rewards the penalties' "
                "differences, however small, would be all that is left to compare; use dr_grpo, rloo or "
                "reinforce_plus_plus (with baseline), or grpo.kl_in=loss"
            )
        if self.best is not None and self.best > self.group_size:
            raise ValueError(
                f"grpo.best={self.best} exceeds grpo.group_size={self.group_size}; train on at most the whole group"
            )
        if self.correction_low >= self.correction_high:
            raise ValueError(
                f"grpo.correction_low={self.correction_low} is not below grpo.correction_high={self.correction_high}: "
                "every token would be masked; lower it"
            )
        if self.max_resamples and self.advantage in ("reinforce_plus_plus", "best_of_n"):
            raise ValueError(
                f"grpo.max_resamples={self.max_resamples} replaces groups of equal rewards, and under grpo.advantage="
                f"{self.advantage} they teach; set grpo.max_resamples=0"
            )
        if self.max_resamples and self.group_size < 2:
            raise ValueError(
                f"grpo.max_resamples={self.max_resamples} looks for groups of unequal rewards, and a group of one has "
                "none; set grpo.max_resamples=0"
            )
        return self

    @property
    def needs_old(self) -> bool:
        """Whether a term of the loss compares with the log-probs of the step's first policy."""
        in_reward = self.kl_coef > 0 and self.kl_in == "reward"
        return self.surrogate != "logprob" or self.correction != "none" or self.kl_unbiased or in_reward

    def _unused(self) -> None:
        """Raise ValueError for a key that the others leave without effect."""
        needs = {
            "best": (self.advantage == "best_of_n", "grpo.advantage=best_of_n"),
            "best_above": (self.advantage == "best_of_n", "grpo.advantage=best_of_n"),
            "clip_low": (self.surrogate in ("clip", "cispo"), "grpo.surrogate=clip or cispo"),
            "clip_high": (self.surrogate in ("clip", "cispo"), "grpo.surrogate=clip or cispo"),
            "dual_clip": (self.surrogate == "clip" and self.advantage != "best_of_n", "clip and negative advantages"),
            "off_policy_threshold": (self.advantage != "best_of_n", "negative advantages, which best_of_n has none of"),
            "sapo_tau_positive": (self.surrogate == "sapo", "grpo.surrogate=sapo"),
            "sapo_tau_negative": (self.surrogate == "sapo", "grpo.surrogate=sapo"),
            "ratio": (self.surrogate != "logprob", "a grpo.surrogate that has one (clip, cispo or sapo)"),
            "kl_estimator": (self.kl_coef > 0, "grpo.kl_coef above 0"),
            "kl_in": (self.kl_coef > 0, "grpo.kl_coef above 0"),
            "kl_unbiased": (self.kl_coef > 0 and self.kl_in == "loss", "a KL term in the loss"),
            "old_logprobs": (self.needs_old, "a term that compares with old log-probs"),
            "entropy_delta": (self.entropy_target is not None, "grpo.entropy_target"),
            "correction_level": (self.correction != "none", "grpo.correction=truncate or mask"),
            "correction_low": (self.correction == "mask", "grpo.correction=mask"),
            "correction_high": (self.correction != "none", "grpo.correction=truncate or mask"),
        }
        for key, (used, what) in needs.items():
            value = getattr(self, key)
            if not used and value != type(self).model_fields[key].default:
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ValueError(f"grpo.{key}={shown} would never be used: it needs {what}; leave it out, or set that")
