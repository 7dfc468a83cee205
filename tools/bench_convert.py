"""What a conversion needs in memory and time: a random Llama to Megatron's format and back, under a limit on memory.

python tools/bench_convert.py SCRATCH --gigabytes 9 --limit 1.5

The limit is a control group's (version 1 or 2; it takes root): it counts the process' memory and its share of the page
cache. SCRATCH needs three times the model's size on the disk; what is made there is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats.hugging_face import Writer
from grpo_mega.model.names import shapes

GROUPS = {  # where control groups are -> the files of the limit and of the processes
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}
LAYER_BYTES = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 11008)  # of a layer of the model below, in bfloat16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip


def make_model(folder: Path, gigabytes: float) -> int:
    """Write a model of about that size, a tensor at a time; its bytes."""
    seed = folder.with_name("config")
    seed.mkdir(parents=True)
    layers = max(1, round((gigabytes * 1e9 - 4 * 32000 * 4096) / LAYER_BYTES))
    (seed / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    arch = read_architecture(seed)
    writer = Writer(arch, folder, dict.fromkeys(shapes(arch), torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(arch).items():
        writer.put(name, torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
    writer.close()
    return writer.nbytes


def limited(gigabytes: float) -> Path:
    """A control group of that much memory. Raises OSError where none can be made."""
    root, limit = next((root, limit) for root, limit in GROUPS.items() if (root / "cgroup.procs").exists())
    group = root / f"bench-convert-{os.getpid()}"
    group.mkdir()
    (group / limit).write_text(str(int(gigabytes * 1e9)))
    return group


def converted(source: Path, destination: Path, group: Path | None) -> float:
    """Seconds of `grpo-mega convert source destination --skip-logits`."""
    command = [sys.executable, "-m", "grpo_mega", "convert", str(source), str(destination), "--skip-logits"]
    join = None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    started = time.monotonic()
    subprocess.run(command, check=True, preexec_fn=join)
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, default=9.0, help="of the model's tensors")
    parser.add_argument("--limit", type=float, help="gigabytes of memory (default: no limit)")
    options = parser.parse_args()
    scratch = options.scratch / f"bench-convert-{os.getpid()}"
    group = None if options.limit is None else limited(options.limit)
    try:
        size = make_model(scratch / "huggingface", options.gigabytes)
        there = converted(scratch / "huggingface", scratch / "megatron", group)
        back = converted(scratch / "megatron", scratch / "back", group)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if group is not None:
            group.rmdir()
    bound = "no limit" if options.limit is None else f"a limit of {options.limit} GB"
    print(f"{size / 1e9:.2f} GB under {bound} on memory: to Megatron {there:.0f} s, back {back:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
