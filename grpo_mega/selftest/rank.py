"""`python -m grpo_mega.selftest.rank SCRATCH DTYPE FILE CASE ...`, as `selftest.main` starts ranks."""

from __future__ import annotations

import sys

from grpo_mega.parallel.device import quiet_megatron

if __name__ == "__main__":
    quiet_megatron()  # before anything imports megatron
    from grpo_mega.selftest.ranks import main

    main(sys.argv[1:])
