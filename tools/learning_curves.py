"""Seven methods on one tiny task, some seeds each: learning curves as a figure, and the table under it.

    python tools/learning_curves.py curves.svg [--seeds 5] [--steps 40] [--json curves.json]

The task (two bytes, an ASCII one and another, in the order that the prompt's first letter asks for, half a point each)
is learnt from a random two-layer Llama by the trainer's own loop, a process a run: what differs between methods is a
preset and nothing else. A step has four updates (two minibatches, twice), so that ratios and clips are at work. Under
process supervision each byte is a step with a reward of its own. Curves are means over the seeds, bands one standard
error; final scores are means of the last ten steps. Two methods differ beyond noise only where their difference is
larger than about twice the root of the sum of their squared standard errors: the table says which do from grpo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WINDOW = 10  # steps at the end whose mean is a run's final score
METHODS: dict[str, dict[str, Any]] = {  # name -> what the recipe says of it
    "grpo": {"preset": "grpo"},
    "grpo without KL": {"preset": "grpo", "grpo": {"kl_coef": 0.0}},
    "dr_grpo": {"preset": "dr_grpo"},
    "dapo": {"preset": "dapo"},
    "gspo": {"preset": "gspo"},
    "gspo, clip 0.2": {"preset": "gspo", "grpo": {"clip_low": 0.2, "clip_high": 0.2}},
    "cispo": {"preset": "cispo"},
    "rloo": {"preset": "rloo", "grpo": {"surrogate": "clip"}},  # the preset's log-prob is for one update a step
    "process supervision": {
        "preset": "grpo", "reward": {"function": "learning_curves:per_byte", "steps": {"every_tokens": 1}},
    },
}  # fmt: skip


def wanted(answer: str) -> tuple[bool, bool]:
    return (True, False) if answer == "ascii first" else (False, True)


def two_kinds(text: str, answer: str, row: Any) -> float:
    """Half a point for each of two bytes that is (not) ASCII as the answer says."""
    return sum(byte.isascii() == kind for byte, kind in zip(text, wanted(answer), strict=False)) / 2


def per_byte(steps: list[str], answer: str, row: Any) -> list[float]:
    """The same, a step a byte: 1 for each that is right."""
    kinds = (*wanted(answer), *[None] * len(steps))
    return [float(step != "" and step.isascii() == kind) for step, kind in zip(steps, kinds, strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path, help="an .svg or .png file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--json", type=Path, help="every reward of every run")
    options = parser.parse_args()
    jobs = [(name, seed) for seed in range(options.seeds) for name in METHODS]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_task(Path(folder))
        arguments = [(folder, name, seed, options.steps, options.lr) for name, seed in jobs]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=one_rank) as pool:
            found = list(pool.map(rewards_of, arguments))
    curves: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for (name, _), rewards in zip(jobs, found, strict=True):
        curves[name].append(rewards)
    for line in table(curves):
        print(line)
    print(f"{len(jobs)} runs of {options.steps} steps, learning rate {options.lr}, {time.monotonic() - began:.0f} s")
    draw(curves, options.figure)
    if options.json:
        options.json.write_text(json.dumps(curves))
    return 0


def make_task(folder: Path) -> None:
    """A random model with a byte tokenizer, and ten prompts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2, bos_token_id=None,
        eos_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder / "model")
    kinds = ("a", "ascii first"), ("b", "ascii last")
    rows = [{"prompt": letter + "x" * n, "answer": answer} for n in range(5) for letter, answer in kinds]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_rank() -> None:
    """This process is a world of one rank, on one core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(os.cpu_count())}  # a core for each of them
    sys.path.insert(0, str(Path(__file__).resolve().parent))


def rewards_of(job: tuple[str, str, int, int, float]) -> list[float]:
    """Mean reward of each step of a run."""
    from grpo_mega.config import validate_recipe
    from grpo_mega.parallel import mesh
    from grpo_mega.trainer import loop
    from grpo_mega.trainer.progress import Progress
    from grpo_mega.trainer.setup import build_run, read_inputs

    folder, name, seed, steps, lr = job
    directory = Path(folder) / f"{name}-{seed}".replace(" ", "")
    method = METHODS[name]
    tree = {
        "preset": method["preset"],
        "model": {"path": f"{folder}/model"},
        "data": {"jsonl": f"{folder}/data.jsonl", "heldout": 0},
        "reward": {"function": "learning_curves:two_kinds"} | method.get("reward", {}),
        "sampling": {"max_completion_tokens": 2},
        "grpo": {"group_size": 16, "num_iterations": 2} | method.get("grpo", {}),
        "batch": {"prompts_per_step": 8, "minibatches": 2, "tokens_per_microbatch": 512},
        "optimizer": {"lr": lr, "beta2": 0.99},
        "run": {"directory": str(directory), "num_steps": steps, "seed": seed},
    }
    tree["reward"]["truncated"] = "reward"  # every completion of two bytes is cut by the limit
    recipe = validate_recipe(tree)
    inputs = read_inputs(recipe, 1)
    run = build_run(recipe, inputs, _mesh(mesh), Progress(None))
    inputs.directory.open(1)
    loop.save = lambda *_: None
    loop.train(run)
    inputs.directory.close()
    return [json.loads(line)["reward"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _mesh(mesh: Any, made: list[Any] = []) -> Any:  # noqa: B006  (one a process)
    if not made:
        made.append(mesh.initialize())
    return made[0]


def final(curve: list[float]) -> float:
    return statistics.fmean(curve[-WINDOW:])


def table(curves: dict[str, list[list[float]]]) -> list[str]:
    """Markdown: final score, its standard error over seeds, steps to 0.8, and whether it differs from grpo's."""
    scores = {name: [final(curve) for curve in several] for name, several in curves.items()}
    error = {
        name: statistics.stdev(of) / math.sqrt(len(of)) if len(of) > 1 else math.nan for name, of in scores.items()
    }
    base, lines = (
        statistics.fmean(scores["grpo"]),
        ["| method | final reward | steps to 0.8 | against grpo |", "|---|---|---|---|"],
    )
    for name, of in scores.items():
        mean = statistics.fmean(of)
        reached = [next((n + 1 for n, value in enumerate(curve) if value >= 0.8), None) for curve in curves[name]]
        steps = [n for n in reached if n is not None]
        shown = (
            f"{statistics.median(steps):.0f}" if len(steps) == len(reached) else f"{len(steps)} of {len(reached)} runs"
        )
        noise = 2 * math.hypot(error[name], error["grpo"])
        verdict = "-"
        if name != "grpo" and noise == noise:  # nan: one seed says nothing about noise
            verdict = f"{mean - base:+.3f}, " + ("beyond noise" if abs(mean - base) > noise else "within noise")
        lines.append(f"| {name} | {mean:.3f} ± {error[name]:.3f} | {shown} | {verdict} |")
    return lines


def draw(curves: dict[str, list[list[float]]], file: Path) -> None:
    """Mean curves with bands of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "learning_curves"}  # the same curves, the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, several in curves.items():
        columns = list(zip(*several, strict=True))
        steps, means = range(1, len(columns) + 1), [statistics.fmean(column) for column in columns]
        errors = [statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0.0 for c in columns]
        (line,) = axes.plot(steps, means, label=name)
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="reward", ylim=(0.4, 1.02))
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
