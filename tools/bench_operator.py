"""What the output layer costs, from hidden states to the gradients of a GRPO loss: ours beside its peers.

    python tools/bench_operator.py --tokens 1024 4096 --vocabulary 49152 131072 [--dtype bf16] [--tensor 2]
    python tools/bench_operator.py --peer-python trl-env/bin/python        # also what is installed there: TRL, Liger

Every measurement is a process of its own. The contenders take turns, --rounds times, and medians are reported: CPU
seconds (on a GPU: seconds) of forward and of forward and backward, the peak of memory above operands and gradients,
operations in matrix products in units of T H V (--tensor 2: T H V / 2), and collectives of forward and backward.
A cell whose full logits would not fit is left out, with the reason.

dense: log_softmax of full logits. megatron: its vocab_parallel_cross_entropy on full logits, no entropy. TRL: the fused
head of its GRPOTrainer. liger: its fused linear GRPO loss. two sweeps, one sweep: ours, with entropies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
CONTENDERS = ("dense", "megatron", "trl", "liger", "two sweeps", "one sweep")
PEERS = ("trl", "liger")  # in the environment of --peer-python
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    options = parser().parse_args()
    if options.child:
        print(json.dumps(child(**json.loads(options.child))))
        return 0
    for vocabulary in options.vocabulary:
        for tokens in options.tokens:
            cell = {"tokens": tokens, "vocabulary": vocabulary, "hidden": options.hidden, "dtype": options.dtype,
                    "tensor": options.tensor}  # fmt: skip
            show(cell, measure(cell, options))
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    result.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 49152, 131072, 262144])
    result.add_argument("--hidden", type=int, default=576)
    result.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    result.add_argument("--tensor", type=int, choices=(1, 2), default=1, help="ranks that the vocabulary is cut over")
    result.add_argument("--rounds", type=int, default=3)
    result.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    result.add_argument("--peer-python", default=sys.executable, help="interpreter with TRL and Liger")
    result.add_argument("--gib", type=float, default=8.0, help="leave out what needs more memory than this a rank")
    result.add_argument("--child", help=argparse.SUPPRESS)
    return result


# ---- the referee


def measure(cell: dict, options: argparse.Namespace) -> dict[str, dict | str]:
    """{contender: medians, or why there are none}."""
    results: dict[str, list | str] = {}
    for _ in range(options.rounds):
        for contender in options.contenders:
            if isinstance(results.get(contender), str):
                continue
            found = left_out(contender, cell, options.gib) or run(contender, cell, options.peer_python)
            if isinstance(found, str):
                results[contender] = found
            else:
                results.setdefault(contender, []).append(found)
    return {
        name: several
        if isinstance(several, str)
        else {key: statistics.median(one[key] for one in several) for key in several[0]}
        for name, several in results.items()
    }


def left_out(contender: str, cell: dict, gib: float) -> str | None:
    if cell["tensor"] > 1 and contender in ("dense", *PEERS):
        return "does not cut the vocabulary"
    size = cell["tokens"] * cell["vocabulary"] * 4 / cell["tensor"] / 2**30
    copies = {"dense": 3, "megatron": 3}.get(contender, 0)
    return f"{copies} x {size:.0f} GiB of logits" if size * copies > gib else None


def run(contender: str, cell: dict, peer_python: str) -> dict | str:
    python = peer_python if contender in PEERS else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(cell["tensor"]):
            job = {"contender": contender, **cell, "rank": rank, "store": str(Path(folder) / "store")}
            environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // cell["tensor"]))
            command = [python, str(HERE), "--child", json.dumps(job)]
            children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        outputs = [one.communicate() for one in children]
    for one, (_, error) in zip(children, outputs, strict=True):
        if one.returncode:
            last = error.decode().strip().splitlines()[-1:] or [f"exit code {one.returncode}"]
            return last[0][:90]
    return json.loads(outputs[0][0].splitlines()[-1])


def show(cell: dict, results: dict[str, dict | str]) -> None:
    print(f"\nT={cell['tokens']} H={cell['hidden']} V={cell['vocabulary']} {cell['dtype']} on {cell['tensor']} rank(s)")
    print(f"{'':<12}{'forward s':>10}{'both s':>10}{'MiB above':>11}{'T H V':>7}{'collectives':>12}  against one sweep")
    ours = results.get("one sweep")
    for name, row in results.items():
        if isinstance(row, str):
            print(f"{name:<12}  left out: {row}")
            continue
        ratio = f"{row['both'] / ours['both']:.2f}x time" if isinstance(ours, dict) else ""
        print(
            f"{name:<12}{row['forward']:>10.2f}{row['both']:>10.2f}{row['memory'] / 2**20:>11.0f}"
            f"{row['products']:>7.2f}{row['collectives']:>12.0f}  {ratio}"
        )


# ---- one measurement


def child(contender: str, tokens: int, vocabulary: int, hidden: int, dtype: str, tensor: int, rank: int, store: str):
    """Seconds and memory of the second pass (the first warms up), products and collectives of a third."""
    group = join(tensor, rank, store)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and contender in ("two sweeps", "one sweep"):
        from grpo_mega.parallel import onednn

        onednn.install()  # as every run of ours does
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device).to(DTYPES[dtype]).requires_grad_()
    whole = torch.randn(vocabulary, hidden, device=device) / hidden**0.5
    part = slice(rank * vocabulary // tensor, (rank + 1) * vocabulary // tensor)
    weight = whole[part].to(DTYPES[dtype]).requires_grad_()
    del whole
    data = Data(tokens, vocabulary, device)
    step = way(contender, x, weight, data, group, vocabulary)
    step()()
    x.grad.zero_()
    if contender in ("two sweeps", "one sweep"):  # under megatron the gradient is summed in float32, outside
        weight.grad, weight.main_grad = None, torch.zeros(weight.shape, device=device)
    before = reset_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    backward = step()
    synchronize(device)
    middle = clock()
    backward()
    synchronize(device)
    end = clock()
    memory = peak(device) - before
    counts = Counts()
    with counts:
        step()()
    unit = tokens * hidden * vocabulary / tensor
    return {"forward": middle - start, "both": end - start, "memory": max(memory, 0),
            "products": counts.operations / unit, "collectives": counts.collectives}  # fmt: skip


class Data:
    """Targets, and what a GRPO loss compares log-probs with."""

    def __init__(self, tokens: int, vocabulary: int, device: torch.device):
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        self.old = torch.full((tokens,), -float(torch.tensor(vocabulary).log()) - 0.5, device=device)
        self.advantages = torch.randn(tokens, device=device)
        self.weights = torch.full((tokens,), 1.0 / tokens, device=device)

    def loss(self, logprobs, entropies, where=slice(None)):
        from grpo_mega.objective.grpo import Terms, grpo_loss
        from grpo_mega.types import TokenBatch

        old = self.old[where]
        tokens = TokenBatch(self.weights[where], self.advantages[where], old, old_logprobs=old, ref_logprobs=old)
        return grpo_loss(logprobs, entropies, tokens, Terms())


def way(contender: str, x, weight, data: Data, group, vocabulary: int):
    """A forward, which returns its backward."""
    if contender in ("two sweeps", "one sweep"):
        from grpo_mega.parallel.vocab import logprobs_and_entropies, one_sweep_loss

        options = {"vocab_size": vocabulary, "group": group}
        if contender == "one sweep":
            return lambda: one_sweep_loss(x, weight, data.targets, data.loss, lambda *_: None, **options).backward
        return lambda: data.loss(*logprobs_and_entropies(x, weight, data.targets, **options))[0].backward
    if contender == "dense":

        def dense():
            logp = torch.log_softmax((x @ weight.t()).float(), dim=1)
            return data.loss(logp.gather(1, data.targets[:, None])[:, 0], data.old)[0].backward

        return dense
    if contender == "megatron":
        from grpo_mega.parallel import cpu
        from grpo_mega.parallel.device import prepare
        from grpo_mega.parallel.mesh import initialize

        prepare()
        initialize(tensor=2 if group is not None else 1)
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        def megatron():
            with cpu.suspended():
                logits = (x @ weight.t()).float()[:, None]
                return data.loss(-vocab_parallel_cross_entropy(logits, data.targets[:, None])[:, 0], data.old)[
                    0
                ].backward

        return megatron
    if contender == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        def trl():
            wanted = ("log_probs", "entropy")  # what its GRPOTrainer asks for
            found = ChunkedLogProbFunction.apply(
                x, weight, None, data.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted
            )
            return data.loss(found[0], data.old)[0].backward

        return trl
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    liger = LigerFusedLinearGRPOLoss(beta=0.04, compiled=False, chunk_size=1)
    rows = 8 if len(data.targets) % 8 == 0 else 1
    shaped = [v.view(rows, -1) for v in (data.targets, data.old)]

    def with_liger():
        loss = liger(
            x.view(rows, -1, x.shape[1]), weight, shaped[0], torch.ones_like(shaped[1]), data.advantages[:rows],
            ref_per_token_logps=shaped[1], old_per_token_logps=shaped[1],
        )  # fmt: skip
        return loss[0].backward

    return with_liger


class Counts(torch.utils._python_dispatch.TorchDispatchMode):
    """Operations of matrix products, and collectives that were called."""

    def __init__(self):
        super().__init__()
        self.operations, self.collectives = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        self.collectives += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def join(tensor: int, rank: int, store: str):
    """The group that the vocabulary is cut over; None for one rank."""
    if tensor == 1:
        return None
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(tensor), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(tensor))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, tensor), rank=rank, world_size=tensor)
    return dist.group.WORLD


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Forget the peak; bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set begins anew
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
