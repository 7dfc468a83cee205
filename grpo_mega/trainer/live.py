"""The live display: a table that grows by a row a step, and below it a few lines about what is under way.

Other processes write to the same terminal: ranks that warn or fail, reward functions that print. rich's own Live keeps
the cursor below what it shows and moves up by the lines it remembers, so that a foreign line would be wiped out and
leave a stale one behind. Here the cursor rests on an empty line above the shown ones and everything below it is drawn
again each time: a foreign line stays, and the display moves down by itself. Nor is the cursor ever hidden, so that a
rank that is killed leaves a usable terminal. What is drawn, and how wide, is rich's.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_mega.trainer.ending import end_at_once
from grpo_mega.trainer.progress import GOALS, METRICS, StepDone, Work, clock

REFRESH_SECONDS = 0.1
HEADER_EVERY = 20  # rows of the table
MOST_REWARDS = 40  # in the sparkline
BARS = "▁▂▃▄▅▆▇█"
SMALLEST = (40, 10)  # columns and lines of a terminal in which a display makes sense


class Live:
    """A Display for a terminal. Its methods may be called from the refreshing thread too."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.console = Console(file=stream, highlight=False, soft_wrap=False)
        self._lock = threading.RLock()
        self._work: Work | None = None
        self._done: StepDone | None = None
        self._curve: deque[float] = deque(maxlen=MOST_REWARDS)
        self._rows = 0  # of the table since its header
        self._drawn = 0.0
        self._shown = False

    @property
    def possible(self) -> bool:
        """Whether this terminal can show it."""
        columns, lines = self.console.size
        return not self.console.is_dumb_terminal and columns >= SMALLEST[0] and lines >= SMALLEST[1]

    def watch(self) -> None:
        """Keep the clock going while nothing ticks; on SIGTERM and Ctrl-C clean the terminal and end at once.

        At once, because the main thread may be deep in a collective that will never end, where Python's own handlers do
        not run: C writes the signal's number into a pipe, and a thread reads it. Only the main thread may call.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def _watch(self, pipe: int) -> None:
        while True:
            if select.select([pipe], [], [], 1.0)[0]:
                number = os.read(pipe, 1)[0]
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.close()
                    end_at_once(128 + number)
            elif self._shown:
                self._redraw()

    def say(self, text: str) -> None:
        with self._lock:
            self._rows = 0  # what comes next is far from the table's header
            self._redraw(text + "\n")  # as it stands: the terminal wraps it, and a long path can be copied whole

    def begin(self, work: Work) -> None:
        with self._lock:
            self._work = work
            self._redraw()

    def move(self, work: Work) -> None:
        if time.monotonic() - self._drawn > REFRESH_SECONDS:
            self._redraw()

    def end_task(self, work: Work, text: str) -> None:
        with self._lock:
            self._work = None
            self.say(work.label + text)

    def end_step(self, done: StepDone) -> None:
        with self._lock:
            self._done = done
            self._curve.append(done.metrics[_goal(done)])
            above = [Text(_cells(_header(done)), "bold")] if self._rows % HEADER_EVERY == 0 else []
            above.append(Text(_cells(_row(done))))
            if errors := int(done.metrics.get("reward_errors", 0)):
                above.append(Text(f"{'':>9}  reward errors: {errors}, see `error` in rollouts/", "yellow"))
            self._rows += 1
            self._work = None if done.step == done.steps else self._work
            self._redraw(self._rendered(Group(*above)))

    def close(self) -> None:
        with self._lock:
            self._work = None
            self._redraw()

    def _redraw(self, above: str = "") -> None:
        """Erase from the cursor's line on, write what stays, and the display below it: all in one write."""
        with self._lock:
            text = ("\r\x1b[J" if self._shown else "") + above
            lines = self._rendered(self._region()).splitlines() if self._work is not None else []
            lines = lines[: self.console.size.height - 2]
            self._shown, self._drawn = bool(lines), time.monotonic()
            if lines:
                text += "\n" + "\n".join(lines) + f"\r\x1b[{len(lines)}A"
            self.stream.write(text)
            self.stream.flush()

    def _rendered(self, what: RenderableType) -> str:
        """With its colours, lines cut to the terminal's width."""
        with self.console.capture() as capture:
            self.console.print(what, no_wrap=True, overflow="ellipsis", crop=True)
        return capture.get()

    def _region(self) -> RenderableType:
        """One line about the work; in a step two more about the last step that is done."""
        work = self._work
        assert work is not None
        parts: list[RenderableType] = [Text(work.label, "bold")]
        if work.step:
            parts.append(Text(work.phase))
        bar = Text() if work.share is None else ProgressBar(total=1.0, completed=work.share)
        parts += [bar, Text("" if work.share is None else f"{work.share:4.0%}")]
        parts.append(Text(clock(time.monotonic() - work.began), "dim"))
        if work.step and self._done is not None:
            parts.append(Text(f"eta {clock(self._done.eta_s)}"))
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for part in parts:
            line.add_column(ratio=1 if part is bar else None, no_wrap=True)
        line.add_row(*parts)
        if not work.step:
            return line
        return Group(line, *self._last_step(work))

    def _last_step(self, work: Work) -> list[Text]:
        done = self._done
        spark = "" if self.console.options.ascii_only else sparkline(list(self._curve))
        goal = work.note or (f"{_goal(done)} {done.metrics[_goal(done)]:.3f}" if done else "")
        lines = [Text(f"{goal}  {spark}".strip(), "bold")]
        if done:
            phases = "  ".join(f"{name} {spent:.1f}" for name, spent in done.seconds.items() if spent >= 0.05)
            lines.append(Text(f"last step {done.timings['step_s']:.1f}s:  {phases}", "dim"))
        return lines


_WIDTHS = (9, 8, 9, 7, 9, 9, 9, 9, 8)  # 77 columns: a row is one line in 80


def _goal(done: StepDone) -> str:
    return next(name for name in GOALS if name in done.metrics)


def _header(done: StepDone) -> Sequence[str]:
    return ("step", _goal(done), "kl", "clip", "entropy", "grad", "sample/s", "train/s", "s")


def _row(done: StepDone) -> Sequence[str]:
    keys = (_goal(done), "kl", "clip_fraction", "entropy", "grad_norm")
    metrics = (f"{done.metrics[key]:{METRICS[key][1]}}" if key in done.metrics else "-" for key in keys)
    known = (done.timings.get(f"{name}_tokens_per_s") for name in ("sampling", "training"))
    rates = ("-" if rate is None else f"{rate:.0f}" for rate in known)
    return (f"{done.step}/{done.steps}", *metrics, *rates, f"{done.timings['step_s']:.1f}")


def _cells(words: Sequence[str]) -> str:
    return "".join(f"{word:>{width}}" for word, width in zip(words, _WIDTHS, strict=True))


def sparkline(values: Sequence[float]) -> str:
    """One block a value, the lowest and the highest block being the smallest and the largest value; a value that is no
    finite number has none."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)
