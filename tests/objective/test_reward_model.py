"""Losses of scores: by hand, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.objective.reward_model import label_loss, preference_loss


def test_preferences_by_hand():
    """Margins ln 3 and -ln 3: sigma is 3/4 and 1/4, the mean of -ln is (ln 4/3 + ln 4) / 2."""
    scores = torch.tensor([math.log(3), 0.0, 1.0, 1.0 + math.log(3)], dtype=torch.float64)
    loss, metrics = preference_loss(scores)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, abs=1e-12)
    assert metrics["accuracy"].value() == 0.5 and metrics["margin"].value() == pytest.approx(0.0, abs=1e-12)


def test_labels_by_hand():
    """sigma(ln 3) = 3/4 with label 1, sigma(0) = 1/2 with label 0, sigma(-ln 3) = 1/4 with label 1/4."""
    scores = torch.tensor([math.log(3), 0.0, -math.log(3)], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    loss, metrics = label_loss(scores, labels)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2) + entropy) / 3, abs=1e-12)
    assert metrics["accuracy"].value() == pytest.approx(2.5 / 3)  # a score of 0 counts half
    assert metrics["margin"].value() == pytest.approx((math.log(3) + 0.5 * math.log(3)) / 3, abs=1e-12)


def test_a_large_margin_does_not_overflow():
    loss, _ = preference_loss(torch.tensor([-800.0, 800.0], dtype=torch.float64))
    assert loss.item() == 1600.0


def test_derivatives():
    """dL/ds of a pair is -+ sigma(s_r - s_c) / n; of a label (sigma(s) - y) / n."""
    torch.manual_seed(0)
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: preference_loss(s)[0], scores)
    assert torch.autograd.gradcheck(lambda s: label_loss(s, labels)[0], scores)
    (slopes,) = torch.autograd.grad(preference_loss(scores)[0], scores)
    pull = torch.sigmoid(scores[1::2] - scores[0::2]) / 3
    torch.testing.assert_close(slopes, torch.stack((-pull, pull), dim=1).flatten())
    (slopes,) = torch.autograd.grad(label_loss(scores, labels)[0], scores)
    torch.testing.assert_close(slopes, (torch.sigmoid(scores) - labels) / 6)
