"""How a mixture's router scores, chooses and weighs, in words that torch is not needed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Router:
    """score: of a row for an expert, from its logits over experts; softmax is over all experts, sigmoid of each alone.

    The experts_per_token with the highest score (plus the expert's bias, where biased) are chosen; with groups > 1 only
    from the top_groups groups of equally many experts whose `group_score` is highest: the highest of their scores, or
    the sum of their two highest (arXiv:2405.04434, section 2.1.2; arXiv:2412.19437, section 2.1.2). The weight of each
    is its score without bias, divided by the sum over the chosen where normalised, times `scale`. As it
    stands below it is Mixtral's rule (arXiv:2401.04088, equation 1).
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    biased: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "two"] = "max"
