"""An entropy bonus whose coefficient follows a target: Skywork-OR1, arXiv:2505.22312, section 4 (adaptive control)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EntropyControl:
    """alpha_k of step k, which is in the loss only while the last step's entropy was at most the target:

        alpha_{k+1} = alpha_k + delta if e_k < target, else alpha_k - delta;   in the loss: alpha_k 1[e_k <= target]

    Entropies in nats a token, as the objective reports them. Diff from the paper: e_k is the mean entropy over step
    k - 1's update (the one before), not over a pass of its own; and alpha never falls below 0, where the bonus would
    turn into a penalty.
    """

    coef: float
    target: float
    delta: float
    entropy: float | None = None  # of the last step; None before the first

    @property
    def in_loss(self) -> float:
        """The coefficient of this step's loss."""
        return self.coef if self.entropy is None or self.entropy <= self.target else 0.0

    def after(self, entropy: float) -> EntropyControl:
        """The control of the next step, given this one's mean entropy."""
        change = self.delta if entropy < self.target else -self.delta
        return EntropyControl(max(0.0, self.coef + change), self.target, self.delta, entropy)
