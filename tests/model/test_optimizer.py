"""AdamW and its schedule around a sharded model, against the textbook's numbers."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from grpo_mega.config import OptimizerConfig, ParallelConfig
from grpo_mega.model.build import build_model
from grpo_mega.model.families import read_architecture
from grpo_mega.model.optimizer import build_optimizer, wrap_for_training
from grpo_mega.parallel import mesh

LR, DECAY, BETA1, BETA2, EPS, CLIP = 1e-2, 0.1, 0.9, 0.99, 1e-8, 0.5


def one_update(folder):
    """(name, before, gradient, after) of every parameter for a made-up gradient, and the learning rates by schedule."""
    grid = mesh.initialize()
    arch = read_architecture(folder)
    settings = OptimizerConfig(lr=LR, weight_decay=DECAY, beta1=BETA1, beta2=BETA2, eps=EPS, clip_grad=CLIP)
    model = build_model(arch, grid, ParallelConfig())
    wrapped = wrap_for_training(model, grid)
    optimizer, scheduler = build_optimizer(wrapped, settings, num_steps=10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    for part in wrapped:
        part.zero_grad_buffer()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(gradients[name])
    scheduler.step(1)
    _, norm, _ = optimizer.step()
    rows = [(name, before[name], gradients[name], p.detach().clone()) for name, p in model.named_parameters()]
    rates = {}
    for schedule in ("constant", "linear", "cosine"):
        settings = OptimizerConfig(lr=LR, min_lr=LR / 10, schedule=schedule, warmup_steps=4)
        optimizer, scheduler = build_optimizer(wrapped, settings, num_steps=10)
        rates[schedule] = []
        for _ in range(11):
            scheduler.step(1)
            rates[schedule].append(optimizer.param_groups[0]["lr"])
    return rows, norm, rates


@pytest.fixture(scope="module")
def updated(tmp_path_factory):
    from ranks import ranks

    return ranks(1, one_update, tiny.make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1))[0]


def test_one_clipped_adamw_update_decays_matrices_alone(updated):
    rows, norm, _ = updated
    assert norm == pytest.approx(math.sqrt(sum(g.double().square().sum() for _, _, g, _ in rows)), rel=1e-5)
    seen = set()
    for name, before, gradient, after in rows:
        g = gradient.double() * CLIP / (norm + 1e-6)
        # first step: m / (1 - beta1) = g and v / (1 - beta2) = g^2
        direction = g / (g.abs() + EPS)
        decay = 0.0 if before.ndim == 1 else DECAY
        seen.add((before.ndim, decay))
        expected = before.double() * (1 - LR * decay) - LR * direction
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert seen == {(1, 0.0), (2, DECAY)}


def test_schedules_warm_up_from_the_first_step_and_end_at_min_lr(updated):
    rates = updated[2]
    for values in rates.values():
        assert values[:4] == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR])
    assert rates["constant"][4:] == pytest.approx([LR] * 7)
    ratio = [(step - 4) / 7 for step in range(5, 12)]
    assert rates["linear"][4:] == pytest.approx([LR - 0.9 * LR * r for r in ratio])
    assert rates["cosine"][4:] == pytest.approx([0.1 * LR + 0.45 * LR * (1 + math.cos(math.pi * r)) for r in ratio])
