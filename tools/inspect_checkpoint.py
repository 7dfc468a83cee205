"""What a checkpoint holds, Hugging Face's, GGUF or Megatron's, without loading it: layout, shapes, types, sizes, state.

python tools/inspect_checkpoint.py runs/mine/checkpoints/step_100 [--tensors] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from grpo_mega.errors import GrpoMegaError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tensors", action="store_true", help="every tensor on a line of its own")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parser.add_argument("--allow-pickle", action="store_true", help="read Megatron-LM's mp_rank_XX files")
    options = parser.parse_args()
    try:
        from grpo_mega.convert.describe import describe, lines
        from grpo_mega.convert.source import open_source

        with tempfile.TemporaryDirectory() as scratch:
            source = open_source(options.checkpoint, Path(scratch), allow_pickle=options.allow_pickle)
            found = describe(source)
    except GrpoMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found, options.tensors)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
