"""A reward model's head: scores of rows, whole on every tensor rank; and the head of one that is yet to be trained."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.formats import Weights, open_weights
from grpo_mega.model.names import shapes


class ScoreLayer(nn.Module):
    """hidden [..., H] -> scores [..., labels] = hidden W^T + b, in max(float32, dtype of the weights).

    It stands where a language model has its output layer, on the last stage. It is small enough to be whole on every
    tensor rank; under sequence parallelism each of them scores its own rows, and the weights say `sequence_parallel`,
    so that megatron sums their gradients over the ranks, as it does for norms.
    """

    def __init__(self, config: TransformerConfig, labels: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(labels, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(labels, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (a tensor has no such field)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.linear(hidden.to(wide), self.weight.to(wide), bias)


class UntrainedScores:
    """A language model's checkpoint as that of a reward model: its trunk, and scores that are 0 for every text.

    Zeros, because then nothing of what the head will say was drawn: the first update turns the head alone (the
    trunk's gradient goes through the head), and every later one both. See `Weights`.
    """

    def __init__(self, arch: Architecture, language_model: Architecture):
        """arch: of the reward model. Raises ConfigError as `open_weights`."""
        self.arch, self._trunk = arch, open_weights(language_model)
        self._shapes = {name: shape for name, shape in shapes(arch).items() if name.startswith("score.")}

    def check(self) -> None:
        self._trunk.check()

    def stored(self) -> dict[str, Any]:
        return self._trunk.stored()

    def dropped(self) -> dict[str, str]:
        return self._trunk.dropped()

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._shapes else self._trunk.dtype(name)

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        if name not in self._shapes:
            return self._trunk.read(name, dim, start, length)
        zeros = torch.zeros(self._shapes[name])
        return zeros if length is None else zeros.narrow(dim, start, length)


def weights_for(arch: Architecture, language_model: Architecture | None) -> Weights:
    """A reward model's weights: its folder's, or, to begin with, those of a language model."""
    return open_weights(arch) if language_model is None else UntrainedScores(arch, language_model)
