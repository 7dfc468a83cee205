"""Per-tensor differences between two checkpoints of any formats and layouts: Hugging Face, GGUF, Megatron.

python tools/compare_checkpoints.py models/a runs/b/checkpoints/step_100

Exit code 0: every tensor is the same bit by bit (or within --tolerance, relative); 1: some are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from grpo_mega.errors import GrpoMegaError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of a tensor that passes")
    parser.add_argument("--all", action="store_true", help="print tensors that are the same too")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--allow-pickle", action="store_true", help="read Megatron-LM's mp_rank_XX files")
    options = parser.parse_args()
    try:
        rows = compared(options)
    except GrpoMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    bad = [row for row in rows if not row.same and (row.problem or not row.relative <= options.tolerance)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        for row in rows if options.all else bad:
            print(row.line())
        same = sum(row.same for row in rows)
        print(
            f"{len(rows)} tensors: {same} the same, {len(rows) - same - len(bad)} within tolerance, {len(bad)} differ"
        )
    return 1 if bad else 0


def compared(options: argparse.Namespace) -> list:
    from grpo_mega.convert.compare import compare
    from grpo_mega.convert.source import open_source

    with tempfile.TemporaryDirectory() as scratch:
        several = [
            open_source(path, Path(scratch) / str(n), allow_pickle=options.allow_pickle)
            for n, path in enumerate((options.first, options.second))
        ]
        for source in several:
            source.check()
        return list(compare(*several))


if __name__ == "__main__":
    sys.exit(main())
