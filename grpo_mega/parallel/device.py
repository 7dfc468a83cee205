"""Which device and which collective backend this process uses, and how many threads: decided here, once."""

from __future__ import annotations

import logging
import os
import warnings

import psutil
import torch

from grpo_mega.errors import ConfigError
from grpo_mega.parallel import cpu, onednn

_prepared: torch.device | None = None
_KNOWN_RECORDS = {  # logger -> how the record starts that megatron-core 0.19.2 makes in every run
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # for HybridModel, which 0.16.1 has not
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",  # 0.16.1 takes an MLP in no other form
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # said of any save
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # which tensor_parallel/random.py imports
}


def quiet_megatron() -> None:
    """Silence what megatron-core says at import and in every run: missing accelerations (which this project reports
    itself) and deprecations inside megatron. Call before the first import of megatron."""
    for subject in (
        "(Transformer Engine|[Aa]pex)",
        "full scope is deprecated",
        "MimoModelConfig is experimental",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "torch.distributed.\\w+. is deprecated",
        "[Bb]arrier.*device",
        "c10d::",
        # dist_checkpointing, at every load: the first two in both versions, the others in 0.19.2 (common data, no_dist)
        "Please use DTensor instead",
        "`load_state_dict` is deprecated",
        "torch.distributed is disabled, unavailable or uninitialized",
        "The argument order of load has been changed",
        # optimizer/distrib_optimizer.py keeps float32 main weights as views of the weights
        "The .grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", message=f".*{subject}")
    warnings.filterwarnings("ignore", module="megatron", category=DeprecationWarning)
    for name in _KNOWN_RECORDS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KNOWN_RECORDS[record.name])


def prepare() -> torch.device:
    """Bind this process to its device and return it: CUDA device LOCAL_RANK, or the CPU with megatron's stand-in.

    On a CPU the cores are divided among the ranks of this host: threads beyond that cost a factor of 7.
    """
    global _prepared
    if _prepared is not None:
        return _prepared
    quiet_megatron()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start "
                "no more ranks here than it has GPUs"
            )
        _prepared = torch.device("cuda", local_rank)
        torch.cuda.set_device(_prepared)
        return _prepared
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    onednn.install()
    cpu.install()
    _prepared = torch.device("cpu")
    return _prepared


def local_devices() -> int:
    """GPUs of this machine, or the cores that this process may use where there is none."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def free_memory_bytes() -> int:
    """Memory that new processes can have before this machine swaps; no bound where the model goes to GPUs."""
    return 1 << 62 if torch.cuda.is_available() else psutil.virtual_memory().available


def backend(device: torch.device) -> str:
    """The torch.distributed backend for collectives of tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: what the CUDA allocator reserved, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
