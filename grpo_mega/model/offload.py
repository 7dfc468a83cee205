"""Frozen weights that wait in host memory between their uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class HostWeights:
    """The weights of a model that nobody trains: in host memory, and on the model's device only while they are used.

    Whole storages come and go, under parameters that stay the same objects: tied parameters and views remain so. Host
    memory is pinned where the device is a GPU; what is freed there goes back to torch's allocator. On a CPU the bytes
    move all the same, and while they are used exist twice.
    """

    def __init__(self, model: nn.Module):
        """Takes the model's weights as they are now off its device; only `rewritten` may change them from here on."""
        weights = {w.untyped_storage().data_ptr(): w for w in chain(model.parameters(), model.buffers()) if w.numel()}
        self._pairs = [(w.untyped_storage(), _in_host_memory(w)) for w in weights.values()]
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Until its end the model can be used."""
        try:
            for storage, host in self._pairs:
                storage.resize_(host.numel())
                # in the order of the device's stream, as whatever uses it
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(host, non_blocking=True)
            yield
        finally:
            self._leave()

    @contextmanager
    def rewritten(self) -> Iterator[None]:
        """As `on_device`, for who changes the weights: what they are at its end is what host memory holds."""
        with self.on_device():
            yield
            for storage, host in self._pairs:
                host.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))

    def _leave(self) -> None:
        for storage, _ in self._pairs:
            storage.resize_(0)


def _in_host_memory(weight: Tensor) -> Tensor:
    """A copy of the bytes of the tensor's storage, all of it."""
    pinned = weight.device.type == "cuda"
    storage = weight.untyped_storage()
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return host.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
