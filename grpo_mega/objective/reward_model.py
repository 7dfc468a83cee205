"""What a reward model is trained by: losses of scores, and how often a score is on the right side.

Scores are in logits: sigma(s) is the probability that an answer is right, sigma(s_a - s_b) that a is preferred to b.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from grpo_mega.types import Mean, Metrics


def preference_loss(scores: Tensor) -> tuple[Tensor, Metrics]:
    """-mean ln sigma(s_chosen - s_rejected), nats: Bradley and Terry's model as InstructGPT trains it
    (arXiv:2203.02155, equation 1).

    scores [2 n] float: chosen, rejected, chosen, rejected, ... Metrics: accuracy, the share of pairs in the right
    order (a tie counts half), and margin, the mean of s_chosen - s_rejected.
    """
    margins = scores[0::2] - scores[1::2]
    return -logsigmoid(margins).mean(), {"accuracy": _right(margins), "margin": _mean(margins)}


def label_loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """-mean [y ln sigma(s) + (1 - y) ln sigma(-s)], nats: each answer, or each step of one, judged by itself
    (arXiv:2110.14168, section 4; of steps arXiv:2305.20050, section 2.6).

    scores, labels [n] float, labels in [0, 1]. Metrics: accuracy, the share of scores on the label's side of 0 (a score
    of 0 counts half), and margin, the mean of (2 y - 1) s.
    """
    sides = (2 * labels - 1) * scores
    loss = binary_cross_entropy_with_logits(scores, labels)
    return loss, {"accuracy": _right(sides), "margin": _mean(sides)}


def _right(margins: Tensor) -> Mean:
    """How often a margin is above 0."""
    return Mean(float(((torch.sign(margins.detach()) + 1) / 2).double().sum()), len(margins))


def _mean(values: Tensor) -> Mean:
    return Mean(float(values.detach().double().sum()), len(values))
