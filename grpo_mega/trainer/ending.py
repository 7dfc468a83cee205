"""How a rank ends that must not stay: at once, and with the processes it has started."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import NoReturn


def end_at_once(code: int) -> NoReturn:
    """Exit without the interpreter's shutdown: other threads (process groups, pools) must not keep a failed rank alive.

    megatron's checkpoint writer has a manager process, which would outlive the rank and keep a pipe that reads its
    output open for ever.
    """
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(code)
