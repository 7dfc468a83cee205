"""A stand-in for the parts of `torch.cuda` that megatron-core takes for granted, so that it runs on a CPU.

Installed only where no GPU is present, by `device.prepare()`. It answers five habits of megatron-core, the same in
0.16.1 and 0.19.2:

- `device="cuda"` and `Tensor.cuda()` (the token counter of pipeline_parallel/schedules.py, found_inf and the scale of
  optimizer/optimizer.py, clip_grads.py, dist_checkpointing/exchange_utils.py): read as the CPU;
- `Tensor.type()` compared with "torch.cuda.FloatTensor" (optimizer.py, distrib_optimizer.py): given that prefix;
- `torch.cuda.current_device()` given as a device, synchronize, streams, events: the CPU device, nothing to wait for;
- the CUDA random state of tensor_parallel/random.py: torch's own CPU generator;
- uneven exchanges of rows between experts: split sizes as tensors, which transformer/moe/token_dispatcher.py turns into
  numbers only where they lie on a GPU, and gathers of unequal parts (tensor_parallel/mappings.py), which the CPU's
  backend lacks: padded to equal ones.

Nothing of it changes a number (products are `onednn`'s business). A version of megatron-core that it was not checked
with is refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from grpo_mega.errors import ConfigError

CHECKED_VERSIONS = {"0.16.1": "Python 3.10 or 3.11", "0.19.2": "Python 3.12"}
_CPU = torch.device("cpu")
_installed: CudaOnCpu | None = None


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaOnCpu(TorchFunctionMode):
    """Reads a CUDA device argument as the CPU. Active from `install` on, in the thread that installed it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = (args[0], *(_CPU if _is_cuda(arg) else arg for arg in args[1:]))
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _Stream:
    """A stream of a device that finishes every operation before it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, _: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def wait(self, _: Any = None) -> None: ...
    def query(self) -> bool:
        return True


def _answering(value: Any):
    """A new function each time: torch._dynamo's table of torch functions refuses one object under two names."""
    return lambda *_, **__: value


def _get_state():
    return lambda *_, **__: torch.get_rng_state()


def _set_state():
    return lambda state, *_, **__: torch.set_rng_state(state)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


def check_version() -> None:
    """Refuse a megatron-core whose habits were not read: a stand-in that misses one would fail far from here."""
    found = importlib.metadata.version("megatron-core")
    if found not in CHECKED_VERSIONS:
        checked = " or ".join(f"{version} ({python})" for version, python in CHECKED_VERSIONS.items())
        raise ConfigError(
            f"megatron-core {found} has not been checked with the CPU stand-in; install megatron-core {checked}, or "
            "run on a machine with a GPU"
        )


def install() -> None:
    """Put the stand-in in place; a second call does nothing. Call before megatron.core is used."""
    global _installed
    if _installed is not None:
        return
    check_version()
    cuda = torch.cuda
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, _answering(None))
    cuda.current_device = _answering(_CPU)
    for name in ("Stream", "Event"):
        setattr(cuda, name, type(name, (_Stream,), {}))
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _answering(_Stream()))
    cuda.stream = _answering(contextlib.nullcontext())
    cuda.get_rng_state, cuda.set_rng_state = _get_state(), _set_state()
    cuda.manual_seed = _seed
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _answering(None), _answering(None)

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state, random._set_cuda_rng_state = _get_state(), _set_state()
    _install_uneven_collectives()
    _installed = CudaOnCpu()
    _installed.__enter__()


def _install_uneven_collectives() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(rows, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return even_gather(rows, group, None, use_global_buffer)
        parts = even_gather(_padded(rows, max(output_split_sizes)), group).chunk(group.size())
        return torch.cat([part[:length] for part, length in zip(parts, output_split_sizes, strict=True)])

    def scatter(rows, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(rows, group, None, use_global_buffer)
        longest = max(input_split_sizes)
        parts = [_padded(part, longest) for part in rows.split(input_split_sizes)]
        return even_scatter(torch.cat(parts), group)[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def suspended():
    """Leave the mode for a hot loop that names no device (a Python call an operator is felt in decoding)."""
    if _installed is None:
        yield
        return
    with torch._C.DisableTorchFunction():
        yield
