"""What a training step costs, for any recipe; beside TRL's GRPOTrainer on the same work where that is installed.

    python tools/bench_step.py launch/recipes/quickstart.yaml --steps 5 [--section.key value ...]
    python tools/bench_step.py launch/recipes/quickstart.yaml --steps 5 --peer-python trl-env/bin/python

Both train the recipe's model on the recipe's prompts, in the same order, with its group size, lengths, temperature,
KL coefficient, learning rate and this machine's cores. They take turns, a step each, and wait while the other works, so
that both meet the same disturbances. Reported are medians over the steps after the first (--warmup), which allocates.

The peer's environment needs trl, accelerate and datasets; its sampling is transformers' `generate`. Prompts reach it as
chat messages; it stops if its token ids differ from ours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from grpo_mega.config import Recipe, load_recipe, validate_recipe
from grpo_mega.errors import ConfigError, GrpoMegaError

PHASES = ("sample", "reward", "gather", "log-probs", "update", "rest")
HERE = Path(__file__).resolve()


def main() -> int:
    options, overrides = parser().parse_known_args()
    try:
        recipe = load_recipe(options.recipe, overrides)
        if options.peer_python and recipe.sampling.source == "data":
            raise ConfigError(
                "sampling.source=data trains on demonstrations, and TRL's GRPOTrainer has no such step; leave "
                "--peer-python out"
            )
        if options.connect:
            one_rank(recipe, options)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(recipe, options, Path(folder))
    except GrpoMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(recipe, rows, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("recipe", help="a YAML file; --section.key value overrides it")
    result.add_argument("--steps", type=int, default=5, help="steps measured")
    result.add_argument("--warmup", type=int, default=1, help="steps before them")
    result.add_argument("--ranks", type=int, help="our ranks (default: as many as grpo-mega train would start)")
    result.add_argument("--peer-python", help="interpreter of an environment with TRL, to run it side by side")
    result.add_argument("--peer-microbatch", type=int, default=8, help="completions TRL trains on at a time")
    result.add_argument("--json", type=Path, help="write every step's numbers to this file")
    result.add_argument("--connect", help=argparse.SUPPRESS)  # set by this program for the ranks that it starts
    return result


# ---- the referee


def measure(recipe: Recipe, options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """{"grpo_mega": a dict a step, "trl": the same}: the two take turns."""
    listener = Listener(str(folder / "turns"), "AF_UNIX")
    resolved = folder / "recipe.yaml"
    resolved.write_text(json.dumps(bench_recipe(recipe, options, folder).model_dump(mode="json")))  # JSON is YAML
    words = [str(resolved), "--connect", listener.address, "--steps", str(options.steps + options.warmup)]
    ranks = [] if options.ranks is None else ["--ranks", str(options.ranks)]
    commands = {"grpo_mega": [sys.executable, str(HERE), *words, *ranks]}
    if options.peer_python:
        peer = peer_job(load_recipe(resolved), options, folder)
        commands["trl"] = [options.peer_python, str(HERE.with_name("bench_trl.py")), str(peer), listener.address]
    players: dict[str, tuple[subprocess.Popen, Connection]] = {}
    try:
        for name, command in commands.items():
            players[name] = start(name, command, listener)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in players}
        for step in range(options.warmup + options.steps):
            for name, (process, connection) in players.items():
                connection.send("go")
                row = answer(name, process, connection)
                print(f"step {step + 1} {name}: {row['wall']:.2f} s", file=sys.stderr, flush=True)
                if step >= options.warmup:
                    rows[name].append(row)
    finally:
        for process, _ in players.values():
            process.kill()
    return rows


def bench_recipe(recipe: Recipe, options: argparse.Namespace, folder: Path) -> Recipe:
    """The recipe with a directory of its own, long enough to be stopped before its end, without evaluations."""
    tree = recipe.model_dump(mode="json")
    steps = max(recipe.run.num_steps, options.steps + options.warmup + 1)
    tree["run"] |= {"directory": str(folder / "run"), "num_steps": steps, "save_every": 0, "evaluate_every": 0}
    return validate_recipe(tree)


def start(name: str, command: Sequence[str], listener: Listener) -> tuple[subprocess.Popen, Connection]:
    cores = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent.parent)}
    if name == "grpo_mega":
        del environment["OMP_NUM_THREADS"]  # divided among the ranks by their launcher
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    accepted: list[Connection] = []
    import threading

    waiter = threading.Thread(target=lambda: accepted.append(listener.accept()), daemon=True)
    waiter.start()
    while waiter.is_alive():
        waiter.join(0.2)
        if process.poll() is not None:
            raise ConfigError(f"{name} ended with exit code {process.returncode} before its first step; see above")
    return process, accepted[0]


def answer(name: str, process: subprocess.Popen, connection: Connection) -> dict[str, float]:
    while not connection.poll(0.2) and process.poll() is None:
        pass
    try:
        return connection.recv()
    except EOFError:
        code = process.wait()
        why = " (out of memory? TRL needs less with a smaller --peer-microbatch)" if code == -9 else ""
        raise ConfigError(f"{name} ended with exit code {code} in a step{why}; see above") from None


def peer_job(recipe: Recipe, options: argparse.Namespace, folder: Path) -> Path:
    """What TRL is to do, as a file: the recipe, and the prompts in the order in which they come."""
    from grpo_mega.trainer.setup import read_inputs

    if recipe.reward.function != "exact":
        raise ConfigError(f"reward.function={recipe.reward.function!r}: TRL is given the reward exact here; use that")

    inputs = read_inputs(recipe, replica_size(recipe))
    count = (options.steps + options.warmup) * recipe.batch.prompts_per_step
    system = [] if recipe.data.system is None else [{"role": "system", "content": recipe.data.system}]
    prompts = [
        {
            "prompt": [*system, {"role": "user", "content": prompt.text}],
            "answer": prompt.answer,
            "token_ids": list(prompt.token_ids),
        }
        for prompt in inputs.prompts.next(count)
    ]
    job = {
        "recipe": recipe.model_dump(mode="json"),
        "prompts": prompts,
        "steps": options.steps + options.warmup,
        "stop_token_ids": [*inputs.tokenizer.stop_token_ids, *recipe.sampling.stop_token_ids],
        "microbatch": options.peer_microbatch,
        "output": str(folder / "trl"),
    }
    path = folder / "trl.json"
    path.write_text(json.dumps(job))
    return path


def replica_size(recipe: Recipe) -> int:
    return recipe.parallel.tensor * recipe.parallel.pipeline


# ---- our side: the trainer's own loop, stopped between steps


class Finished(Exception):
    """Enough steps."""


class TurnTaking:
    """The prompt stream, which the loop asks first in every step: here it waits for its turn."""

    def __init__(self, stream: Any, pause: Callable[[], None]):
        self.stream, self.pause = stream, pause

    def next(self, count: int) -> Any:
        self.pause()
        return self.stream.next(count)


def one_rank(recipe: Recipe, options: argparse.Namespace) -> None:
    """Start the ranks, or be one."""
    if "RANK" not in os.environ:
        from grpo_mega.cli import ranks_to_fill
        from grpo_mega.parallel.launch import start_ranks

        count = options.ranks or ranks_to_fill(recipe)
        code = start_ranks(count, [str(HERE), *sys.argv[1:]])
        sys.exit(code)
    from dataclasses import replace

    from grpo_mega.parallel import collectives, mesh
    from grpo_mega.parallel.device import quiet_megatron

    quiet_megatron()
    from grpo_mega.trainer import loop
    from grpo_mega.trainer.progress import progress_on
    from grpo_mega.trainer.setup import build_run, read_inputs

    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(recipe.parallel.tensor, recipe.parallel.pipeline)
    connection = Client(options.connect, "AF_UNIX") if grid.is_writer else None
    started: list[tuple[float, float]] = []

    def pause() -> None:
        if started:
            wall, cpu = started[-1]
            mine = (time.perf_counter() - wall, time.process_time() - cpu)
            several = collectives.gather_objects(mine, grid.world.group)
            if connection is not None:
                connection.send(last_step(inputs.directory.path, several))
            if len(started) == options.steps:
                raise Finished
        try:
            collectives.broadcast_object(connection.recv() if connection is not None else None, grid.world.group)
        except EOFError:  # the referee is gone
            os._exit(1)
        started.append((time.perf_counter(), time.process_time()))

    run = build_run(recipe, replace(inputs, prompts=TurnTaking(inputs.prompts, pause)), grid, progress_on(speaks=False))
    if grid.is_writer:
        inputs.directory.open(1)
    try:
        loop.train(run)
    except Finished:
        mesh.shutdown()


def last_step(directory: Path, several: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The numbers of the step that has just ended; several: wall and CPU seconds of every rank."""
    record = json.loads((directory / "timings.jsonl").read_text().splitlines()[-1])
    row = {phase: record.get(f"{phase}_s", 0.0) for phase in PHASES[:-1]}  # demonstrations have no sampling, no reward
    wall = max(seconds for seconds, _ in several)
    return {
        **row,
        "rest": wall - sum(row.values()),
        "wall": wall,
        "cpu": sum(cpu for _, cpu in several),
        "tokens": record["completion_tokens"],
        "sampled": record.get("sampling_tokens_per_s", math.nan),  # by the slowest replica
        "memory": record["peak_memory_bytes_a_rank"] * len(several),
        "processes": len(several),
    }


# ---- what a person reads


def show(recipe: Recipe, rows: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    print(
        f"{recipe.model.path}: {recipe.batch.prompts_per_step} prompts x {recipe.grpo.group_size} completions of at "
        f"most {recipe.sampling.max_completion_tokens} tokens, kl_coef {recipe.grpo.kl_coef}, "
        f"{recipe.precision.dtype}; medians of {options.steps} steps on {len(os.sched_getaffinity(0))} cores"
    )
    columns = ("wall s", *PHASES, "tokens", "tokens/s", "sampled/s", "CPU s", "GiB", "processes")
    print(("{:<10}" + "{:>10}" * len(columns)).format("", *columns))
    medians = {name: summary(steps) for name, steps in rows.items()}
    for name, median in medians.items():
        cells = (median["wall"], *(median[phase] for phase in PHASES), median["tokens"], median["rate"],
                 median["sampled"], median["cpu"], median["memory"] / 2**30)  # fmt: skip
        print(f"{name:<10}" + "".join(f"{cell:>10.2f}" for cell in cells) + f"{median['processes']:>10.0f}")
    if "trl" in medians:
        ours, theirs = medians["grpo_mega"], medians["trl"]
        ratios = [
            (a["tokens"] / a["wall"]) / (b["tokens"] / b["wall"])
            for a, b in zip(rows["grpo_mega"], rows["trl"], strict=True)
        ]
        print(
            f"grpo_mega / TRL: completion tokens/s {statistics.median(ratios):.2f} (steps {min(ratios):.2f} to "
            f"{max(ratios):.2f}), sampling {ours['sampled'] / theirs['sampled']:.2f}, CPU seconds a token "
            f"{(theirs['cpu'] / theirs['tokens']) / (ours['cpu'] / ours['tokens']):.2f} times fewer"
        )


def summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the steps; rate: completion tokens a second of the whole step (sampled: of its sampling)."""
    result = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    result["rate"] = statistics.median(step["tokens"] / step["wall"] for step in steps)
    result["memory"] = max(step["memory"] for step in steps)
    return result


if __name__ == "__main__":
    sys.exit(main())
