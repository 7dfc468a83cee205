"""Scalars for TensorBoard, an event a step, on disk when the call returns.

Through the tensorboard package's own writer of records, not torch's SummaryWriter: that one writes from a thread, which
reports a full disk as a traceback of its own and, to the training loop, a step late.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Scalars:
    """An event file in `directory`, which TensorBoard shows as one run; older files there are kept.

    purge_step: what they say of this step and later ones is not shown, since those steps are run again.
    """

    def __init__(self, directory: Path, purge_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # files are read in the order of their names: a resumed run must come after its beginning
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="grpo_mega")))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve; none for nan, a mean of nothing. Raises OSError."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value == value]
        self._write(Event(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()
