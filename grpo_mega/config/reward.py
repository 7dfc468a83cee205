"""The recipe's `reward` section: what a completion is worth."""

from __future__ import annotations

from typing import Literal

from grpo_mega.config.base import Section


class RewardConfig(Section):
    function: str = "exact"  # exact, or package.module:function
    # what a completion cut by the length limit gets: its reward, no part in the loss, or `truncation_reward`
    truncated: Literal["reward", "mask", "penalize"] = "reward"
    truncation_reward: float = 0.0
