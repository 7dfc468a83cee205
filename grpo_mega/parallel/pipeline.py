"""One pipeline's hand-overs while sampling: hidden states go down the stages, drawn tokens come back from the last."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.parallel.mesh import Mesh


class PipelineLink:
    """Ordered point-to-point hand-overs of one rank. Sends never block, so stages work on different row groups at once.
    The last rank's next is the first, where virtual stages begin another round.

    Every stage must walk through the same row groups in the same order: messages carry no names.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._sent: list[tuple[Any, Tensor]] = []  # a buffer lives until its send is done

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The previous stage's hidden states."""
        buffer = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        axis = self.mesh.pipeline
        dist.recv(buffer, group=axis.group, group_src=(axis.rank - 1) % axis.size)
        return buffer

    def send(self, tensor: Tensor) -> None:
        """Hand hidden states to the next stage."""
        axis = self.mesh.pipeline
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=axis.group, group_dst=(axis.rank + 1) % axis.size)
        self._sent = [(w, t) for w, t in self._sent if not w.is_completed()] + [(work, tensor)]

    def publish(self, drawn: Tensor) -> None:
        """Last stage: start telling every stage what was drawn."""
        axis = self.mesh.tokens
        if axis.size > 1:
            work = dist.broadcast(drawn, group=axis.group, group_src=axis.size - 1, async_op=True)
            self._sent = [(w, t) for w, t in self._sent if not w.is_completed()] + [(work, drawn)]

    def hear(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Other stages: wait for what the last stage published next."""
        axis = self.mesh.tokens
        buffer = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        dist.broadcast(buffer, group=axis.group, group_src=axis.size - 1)
        return buffer

    def flush(self) -> None:
        """Wait until everything that was handed over has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []
