"""One rank of a self-test: its share of each case, laid beside what one process computed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_mega.config import ParallelConfig
from grpo_mega.model.families import read_architecture
from grpo_mega.model.names import shapes
from grpo_mega.parallel import collectives, mesh
from grpo_mega.selftest.cases import TIMEOUT_S, Case, parse
from grpo_mega.selftest.material import write_model
from grpo_mega.selftest.measure import Answer, answer, difference, worst_of


def main(arguments: Sequence[str]) -> None:
    """SCRATCH DTYPE FILE CASE ...; FILE "-": compute the cases alone, for others to be compared with; else append a row
    for each to FILE."""
    scratch, dtype, file, *names = arguments
    grid = mesh.initialize(timeout_s=TIMEOUT_S)
    wanted = [parse(name) for name in names]
    if file == "-":
        for case in wanted:
            torch.save(answer(case, _model(case, Path(scratch)), dtype, grid, None), _saved(case, Path(scratch)))
    else:
        for row in rows_of(wanted, Path(scratch), dtype, grid):
            if grid.is_writer:
                with Path(file).open("a") as out:
                    out.write(json.dumps(row) + "\n")
    mesh.shutdown()


def rows_of(wanted: Sequence[Case], scratch: Path, dtype: str, grid: mesh.Mesh) -> Iterator[dict[str, Any]]:
    """A row for each case, alike on every rank."""
    for case in wanted:
        folder = _model(case, scratch)
        one: Answer = torch.load(_saved(case, scratch), weights_only=False)  # our own file
        started = time.monotonic()
        sizes = ParallelConfig.model_validate(case.parallel).sizes
        with mesh.temporary_groups():
            current = mesh.another_layout(grid, **sizes)
            with current.active():
                found = difference(answer(case, folder, dtype, current, one), one)
            del current
        everyone = collectives.gather_objects(found, grid.world.group)
        known = {name for name, *_ in one.parameters}
        order = [name for name in shapes(read_architecture(folder)) if name in known]
        yield {"case": case.name, **worst_of(everyone, order), "seconds": round(time.monotonic() - started, 1)}


def _model(case: Case, scratch: Path) -> Path:
    """The problem's model folder: every rank writes its own, the same numbers."""
    return write_model(scratch / f"{case.model}-{mesh.rank_from_environment()}", case.model)


def _saved(case: Case, scratch: Path) -> Path:
    return scratch / ("one-" + "-".join(map(str, case.problem)) + ".pt")
