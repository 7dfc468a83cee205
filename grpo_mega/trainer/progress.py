"""What a person sees while a run goes on: a line a step that grows as its phases end, on the writing rank only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    """Writes as things happen; a dot for work under way, so that no more than a few seconds pass in silence.

    Also the run's stopwatch: `seconds` holds the time spent in each phase since `begin`.
    """

    QUIET_SECONDS = 2.0

    def __init__(self, speaks: bool, stream: TextIO | None = None):
        self.speaks, self.stream = speaks, stream or sys.stdout
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()
        self._open = False

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(("\n" if self._open else "") + text + "\n")
        self._open = False

    def begin(self, text: str) -> None:
        """Start a line that `phase` and `end` will add to, and set the stopwatch to zero."""
        self.seconds = {}
        self._write(("\n" if self._open else "") + text)
        self._open = True

    @contextmanager
    def phase(self, name: str, shown: bool = True) -> Iterator[None]:
        """Time a part of the step and, if `shown`, write its name and seconds when it ends."""
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if shown:
            self._write(f" | {name} {spent:.1f}s")

    @contextmanager
    def phase_line(self, name: str) -> Iterator[None]:
        """A phase on a line of its own, outside the step's stopwatch."""
        start = time.monotonic()
        self.begin(name)
        yield
        self.end(f" {time.monotonic() - start:.1f}s")

    def note(self, text: str) -> None:
        self._write(f" {text}")

    def tick(self) -> None:
        """Something moved on."""
        if time.monotonic() - self._last > self.QUIET_SECONDS:
            self._write(".")

    def end(self, text: str = "") -> None:
        self._write(text + "\n")
        self._open = False

    def _write(self, text: str) -> None:
        if self.speaks:
            self.stream.write(text)
            self.stream.flush()
            self._last = time.monotonic()
