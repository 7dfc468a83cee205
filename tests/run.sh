#!/usr/bin/env bash
# The whole test suite, from nothing: bash tests/run.sh [pytest arguments]
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
# two at a time, on cores of their own: most tests are one process, and ranks wait for each other half of their time
exec python -m pytest tests -q -n 2 --dist loadfile --timeout=600 "$@"
