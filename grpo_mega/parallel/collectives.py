"""Collectives with their group as an argument; `group=None` is one process, where each of them is the identity.

Every rank of the group must call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def sum_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group, in place; returns `tensor`."""
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast_(tensor: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
    """The tensor of the group's rank `source`, in place on the others; returns `tensor`."""
    if size(group) > 1:
        dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def gather(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[size, *shape]`: every rank's tensor, in rank order; all must have one shape."""
    if size(group) == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gather_later(tensor: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """`gather` that has begun: call the answer to wait for it. What is computed meanwhile costs no time of its own."""
    if size(group) == 1:
        return lambda: tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(size(group))]
    work = dist.all_gather(parts, tensor.contiguous(), group=group, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return torch.stack(parts)

    return arrived


def reduce_scatter(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[T, ...]` on each rank -> `[T / size, ...]`: this rank's rows of the sum; `size` divides T."""
    if size(group) == 1:
        return tensor
    result = tensor.new_empty(tensor.shape[0] // size(group), *tensor.shape[1:])
    dist.reduce_scatter_tensor(result, tensor.contiguous(), group=group)
    return result


def max_int(value: int, group: ProcessGroup | None, device: torch.device | str = "cpu") -> int:
    """The largest of the ranks' integers: how ranks agree before they branch."""
    if size(group) == 1:
        return value
    agreed = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed)


def sum_int(value: int, group: ProcessGroup | None, device: torch.device | str = "cpu") -> int:
    """The exact sum of the ranks' integers."""
    return int(sum_(torch.tensor([value], dtype=torch.int64, device=device), group))


def broadcast_object(value: Any, group: ProcessGroup | None, source: int = 0) -> Any:
    """`value` of the group's rank `source`, on every rank; pickled: small things that we made ourselves only."""
    if size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source)
    return box[0]


def gather_objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Every rank's value in rank order, on every rank; pickled: small things that we made ourselves only."""
    if size(group) == 1:
        return [value]
    box: list[Any] = [None] * size(group)
    dist.all_gather_object(box, value, group=group)
    return box


def send_to_first(tensor: Tensor | None, source: int, group: ProcessGroup | None) -> Tensor | None:
    """The tensor of the group's rank `source`, on the first rank; None elsewhere. All ranks call, two act."""
    me = rank(group)
    if source == 0:
        return tensor if me == 0 else None
    if me == source:
        assert tensor is not None
        description = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        dist.send_object_list([description], group=group, group_dst=0)
        dist.send(tensor.detach().contiguous(), group=group, group_dst=0)
    elif me == 0:
        header: list[Any] = [None]
        dist.recv_object_list(header, group=group, group_src=source)
        shape, dtype, device = header[0]
        result = torch.empty(shape, dtype=dtype, device=device)  # a type alone means this rank's own device
        dist.recv(result, group=group, group_src=source)
        return result
    return None
