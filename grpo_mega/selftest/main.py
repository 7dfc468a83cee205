"""The command: ranks are started, or found; one process is asked first, then each layout; the table is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_mega.errors import ConfigError
from grpo_mega.selftest.cases import TIMEOUT_S, Case, cases
from grpo_mega.selftest.models import check
from grpo_mega.selftest.table import BOUNDS, broken, heading, line, verdict


def selftest(
    names: Sequence[str] | None, *, world_size: int | None, everything: bool, dtype: str, as_json: bool
) -> int:
    """Try the layouts; the exit code: 0 if each is within the bounds of its dtype, 1 otherwise."""
    under = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    wanted = [case for case in cases(names, everything) if _fits(case, under or world_size, named=names is not None)]
    if not wanted:
        raise ConfigError(
            f"no layout of the table has {under or world_size} ranks; name some by --layouts, or use 1, 2, 4 or 8"
        )
    with tempfile.TemporaryDirectory(prefix="grpo-mega-selftest-") as scratch:
        for case in wanted:
            check(case, Path(scratch))
    if under is not None:
        rows = _on_these_ranks(wanted, dtype)
        return _finish(rows, dtype, as_json) if int(os.environ["RANK"]) == 0 else (1 if _first(rows, dtype) else 0)
    with tempfile.TemporaryDirectory(prefix="grpo-mega-selftest-") as scratch:
        rows = _on_own_ranks(wanted, Path(scratch), dtype, show=not as_json)
    return _finish(rows, dtype, as_json, shown=not as_json)


def _fits(case: Case, world_size: int | None, *, named: bool) -> bool:
    if world_size is not None and case.world != world_size:
        if named:
            raise ConfigError(f"--layouts {case.name} takes {case.world} ranks, and there are {world_size}")
        return False
    return True


# ---- alone: start ranks


def _on_own_ranks(wanted: Sequence[Case], scratch: Path, dtype: str, *, show: bool) -> list[dict[str, Any]]:
    """A world for each size; one that ends early fails the layout that it was at and goes on with the next."""
    rows: list[dict[str, Any]] = []
    if show:
        print(heading(dtype), flush=True)
    _ask_one_process(wanted, scratch, dtype)
    for size in sorted({case.world for case in wanted}):
        left = [case for case in wanted if case.world == size]
        while left:
            file = scratch / f"rows-{size}-{len(left)}"
            process = _start(size, left, scratch, dtype, file)
            done = 0
            while True:
                running = process.poll() is None
                text = file.read_text() if file.exists() else ""
                lines = text[: text.rfind("\n") + 1].splitlines()  # a row may be half written
                for row in lines[done:]:
                    rows.append(json.loads(row))
                    if show:
                        print(line(rows[-1], dtype), flush=True)
                done = len(lines)
                if not running:
                    break
                time.sleep(0.2)
            left = left[done:]
            if left:  # it ended in the middle of one
                words = (scratch / "errors").read_text().strip().splitlines()
                rows.append({"case": left[0].name, "error": words[-1] if words else f"exit code {process.returncode}"})
                if show:
                    print(line(rows[-1], dtype), flush=True)
                left = left[1:]
    return rows


def _start(size: int, left: Sequence[Case], scratch: Path, dtype: str, file: Path) -> subprocess.Popen:
    program = (
        "import sys; from grpo_mega.parallel import launch; "
        "sys.exit(launch.start_ranks(int(sys.argv[1]), sys.argv[2:]))"
    )
    command = ["-m", "grpo_mega.selftest.rank", str(scratch), dtype, str(file), *(case.name for case in left)]
    with (scratch / "errors").open("wb") as errors:
        return subprocess.Popen([sys.executable, "-c", program, str(size), *command], stdout=errors, stderr=errors)


def _ask_one_process(wanted: Iterable[Case], scratch: Path, dtype: str) -> None:
    """Compute every problem of the cases in a process of its own, into `scratch`."""
    names = sorted({_plain(case) for case in wanted})
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    command = [sys.executable, "-m", "grpo_mega.selftest.rank", str(scratch), dtype, "-", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"one process alone fails already: {done.stderr.strip() or done.stdout.strip()}")


def _plain(case: Case) -> str:
    """The name of the case's problem without a layout."""
    words = ["moe"] if case.model == "moe" else []
    words += [case.normalization] if case.normalization != "sequence" else []
    words += [f"mini{case.minibatches}"] if case.minibatches > 1 else []
    words += [f"mu{case.iterations}"] if case.iterations > 1 else []
    return "-".join(words or ["rows1000"])


# ---- on ranks


def _on_these_ranks(wanted: Sequence[Case], dtype: str) -> list[dict[str, Any]]:
    """Every rank of a world that a launcher started; rank 0 asks the one process, beside it."""
    from grpo_mega.parallel.device import quiet_megatron

    quiet_megatron()  # before anything imports megatron
    from grpo_mega.parallel import collectives, mesh
    from grpo_mega.selftest.ranks import rows_of

    grid = mesh.initialize(timeout_s=TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="grpo-mega-selftest-") as own:
        failure = None
        if grid.is_writer:
            try:
                _ask_one_process(wanted, Path(own), dtype)
            except ConfigError as error:
                failure = error
        failure = collectives.broadcast_object(failure, grid.world.group)
        if failure is not None:
            raise failure
        files = {file.name: file.read_bytes() for file in Path(own).iterdir() if file.is_file()}
        for name, content in collectives.broadcast_object(files, grid.world.group).items():
            (Path(own) / name).write_bytes(content)
        rows = list(rows_of(wanted, Path(own), dtype, grid))
    mesh.shutdown()
    return rows


# ---- the end


def _first(rows: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any] | None:
    return next((row for row in rows if broken(row, dtype)), None)


def _finish(rows: Sequence[dict[str, Any]], dtype: str, as_json: bool, shown: bool = False) -> int:
    if as_json:
        print(json.dumps({"dtype": dtype, "bounds": asdict(BOUNDS[dtype]), "rows": list(rows)}, indent=1))
    elif not shown:
        print(heading(dtype))
        for row in rows:
            print(line(row, dtype))
    bad = _first(rows, dtype)
    if not as_json:
        print(verdict(rows, bad, dtype))
    return 1 if bad else 0
