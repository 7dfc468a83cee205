"""Start this program's ranks on one machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from grpo_mega.errors import ConfigError


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `python arguments...` as `count` ranks and wait; the exit code of the first that failed, else 0.

    When one rank fails the launcher ends the others; what a rank prints goes straight to this terminal.
    """
    if count < 1:
        raise ConfigError(f"--ranks={count} starts nothing; give at least 1")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"grpo-mega: rank {failure.local_rank} was ended by signal {-failure.exitcode}"
                + (" (out of memory? start fewer ranks: --ranks N)" if failure.exitcode == -9 else ""),
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:  # Ctrl-C or SIGTERM: the launcher has passed it on to the ranks
        return 128 + error.sigval
    return 0
