#!/usr/bin/env bash
# A first GRPO run, on a CPU, from nothing: bash launch/quickstart.sh [--section.key value ...]
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
exec grpo-mega train launch/recipes/quickstart.yaml "$@"
