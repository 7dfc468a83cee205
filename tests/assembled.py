"""What the ranks hold, as whole tensors under their Hugging Face names: one view for every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from grpo_mega.model import bridge


def assembled(model, arch, grid, layers, value: Callable[[torch.nn.Parameter], Tensor], scratch: Path):
    """value(parameter) of every parameter, put together by the export that the weights go through.

    Every rank must call. Returns {name: tensor} on the writer, None elsewhere; asserts that replicas agree exactly.
    """
    with torch.no_grad():
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.copy_(value(parameter))
        if grid.data.size > 1:
            sums = torch.stack([parameter.double().sum() for parameter in model.parameters()])
            others = sums.clone()
            torch.distributed.broadcast(others, group=grid.data.group, group_src=0)
            assert sums.equal(others), "data-parallel ranks disagree"
        bridge.export(model, arch, grid, layers, scratch)
        for parameter, weight in zip(model.parameters(), kept, strict=True):
            parameter.copy_(weight)
    return load_file(scratch / "model.safetensors") if grid.is_writer else None
