"""What a person sees while a run goes on, and the run's stopwatch; on the writing rank only, the others keep time.

A terminal shows a live display (`trainer/live.py`); a file, a pipe or a terminal that cannot move its cursor, lines.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

ETA_STEPS = 10  # the steps whose mean duration the estimate goes by: the first ones of a run are its slowest
GOALS = ("reward", "loss")  # what a run's curve is of: the first that its steps have (demonstrations have no reward)
METRICS = {  # what is shown of a step's metrics: name there -> (name here, format)
    "reward": ("reward", ".3f"),
    "loss": ("loss", "+.4f"),
    "kl": ("kl", ".4f"),
    "clip_fraction": ("clip", ".3f"),
    "entropy": ("entropy", ".3f"),
    "grad_norm": ("grad", ".3f"),
}


@dataclass
class Work:
    """What is under way: a step, or a task outside steps (loading, evaluating, saving)."""

    label: str
    step: int = 0  # 0: a task
    steps: int = 0
    phase: str = ""  # of a step; a task is its own phase
    began: float = 0.0  # when the phase or task began, time.monotonic()
    share: float | None = None  # of the phase that is done, when that can be told
    note: str = ""  # what the step is known to have brought so far


@dataclass(frozen=True)
class StepDone:
    """A finished step. metrics and timings: as recorded; seconds: of each phase; eta_s: until the last step is done."""

    step: int
    steps: int
    metrics: Mapping[str, float]
    timings: Mapping[str, float]
    seconds: Mapping[str, float]
    eta_s: float


class Display(Protocol):
    """Where progress is shown. `work` changes in place while it is under way."""

    def say(self, text: str) -> None: ...
    def begin(self, work: Work) -> None: ...
    def move(self, work: Work) -> None: ...
    def end_task(self, work: Work, text: str) -> None: ...
    def end_step(self, done: StepDone) -> None: ...
    def watch(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Task:
    """What a task has to say when it ends."""

    result: str = ""


@dataclass
class Progress:
    """Says what goes on, and measures it: `seconds` holds the time spent in each phase since `begin_step`.

    display: None on the ranks that keep silent.
    """

    display: Display | None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._work: Work | None = None
        self._starts: deque[float] = deque(maxlen=ETA_STEPS)
        self._cpu = 0.0
        self._ticks = 0
        self._ticks_before: dict[str, int] = {}  # how many a phase took last time: what its bar is measured by

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.display is not None:
            self.display.say(text)

    def begin_step(self, step: int, steps: int) -> None:
        """Step `step` of `steps` begins, counted from 1; the stopwatch is set to zero."""
        self.seconds = {}
        self._starts.append(time.monotonic())
        self._cpu = time.process_time()
        self._begin(Work(f"step {step:>{len(str(steps))}}/{steps}", step, steps))

    def step_seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._starts[-1]

    def cpu_seconds(self) -> float:
        """CPU time of this process, all its threads, since the step began."""
        return time.process_time() - self._cpu

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step."""
        assert self._work is not None, "a phase belongs to a step"
        self._work.phase = name
        with self._timed(name):
            yield

    @contextmanager
    def task(self, name: str, which: str = "") -> Iterator[Task]:
        """Something between steps, shown as "name which"; its `result` is said with the seconds that it took."""
        started, task = time.monotonic(), Task()
        self._begin(Work(name + which, phase=name))
        with self._timed(name):
            yield task
        seconds = f"{time.monotonic() - started:.1f}s"
        if self.display is not None and self._work is not None:
            self.display.end_task(self._work, f": {task.result}, {seconds}" if task.result else f" {seconds}")
        self._work = None

    def note(self, text: str) -> None:
        """What the step is known to have brought so far."""
        if self._work is not None:
            self._work.note = text
            self._show()

    def tick(self, done: int | None = None, total: int | None = None) -> None:
        """Something moved on; done, total: how far, where the caller knows. Otherwise ticks are counted, and compared
        with how many the same phase took the last time."""
        self._ticks += 1
        if self._work is None:
            return
        if done is not None and total:
            self._work.share = done / total
        elif before := self._ticks_before.get(self._work.phase):
            self._work.share = min((self._ticks - 1) / before, 1.0)  # it ticks before each piece of work
        self._show()

    def end_step(self, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """The step is recorded: show it."""
        work, self._work = self._work, None
        assert work is not None, "no step has begun"
        a_step = (time.monotonic() - self._starts[0]) / len(self._starts)
        if self.display is not None:
            eta = a_step * (work.steps - work.step)
            self.display.end_step(StepDone(work.step, work.steps, metrics, timings, dict(self.seconds), eta))

    def watch(self) -> None:
        """Look after the terminal until the process ends; called once, by the main thread of a rank."""
        if self.display is not None:
            self.display.watch()

    def close(self) -> None:
        """Leave the terminal as it was found; nothing is shown afterwards."""
        if self.display is not None:
            self.display.close()
        self.display = None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        assert self._work is not None
        self._ticks, self._work.share, self._work.began = 0, None, time.monotonic()
        self._show()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - self._work.began
        self._ticks_before[name] = self._ticks

    def _begin(self, work: Work) -> None:
        self._work, work.began = work, time.monotonic()
        if self.display is not None:
            self.display.begin(work)

    def _show(self) -> None:
        if self.display is not None and self._work is not None:
            self.display.move(self._work)


def progress_on(stream: TextIO | None = None, *, speaks: bool = True) -> Progress:
    """Progress on a stream (standard output): live on a capable terminal, else lines; silent unless `speaks`."""
    if not speaks:
        return Progress(None)
    stream = stream or sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")  # a completion's characters may be none of the terminal's
    if stream.isatty():
        from grpo_mega.trainer.live import Live

        live = Live(stream)
        if live.possible:
            return Progress(live)
    return Progress(Lines(stream))


class Lines:
    """For logs: a whole line a step, written at once when it ends.

    Work that takes longer than QUIET_SECONDS says how far it is on a line that grows, so that nobody wonders; a step's
    line never shares it.
    """

    QUIET_SECONDS = 3.0

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._last = time.monotonic()
        self._open = False
        self._said = ("", "")  # what the growing line last named

    def say(self, text: str) -> None:
        self._write(self._break() + text + "\n")

    def begin(self, work: Work) -> None:
        if work.step:
            self._last = time.monotonic()
        else:
            self._write(self._break() + work.label)
            self._open = True

    def move(self, work: Work) -> None:
        now = time.monotonic()
        if now - self._last <= self.QUIET_SECONDS:
            return
        name = ""
        if work.step and (not self._open or self._said != (work.label, work.phase)):
            name = (" |" if self._open else f"  {work.label}:") + f" {work.phase}"
        self._said, self._open = (work.label, work.phase), True
        far = f"{now - work.began:.0f}s" if work.share is None else f"{work.share:.0%}"
        self._write(name + ("" if far in ("0s", "0%") else " " + far))

    def end_task(self, work: Work, text: str) -> None:
        self._write(("" if self._open else work.label) + text + "\n")
        self._open = False

    def end_step(self, done: StepDone) -> None:
        self._write(self._break() + step_line(done) + "\n")

    def watch(self) -> None:
        """A file needs no looking after."""

    def close(self) -> None:
        if text := self._break():
            self._write(text)

    def _break(self) -> str:
        text, self._open = ("\n" if self._open else ""), False
        return text

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
        self._last = time.monotonic()


def step_line(done: StepDone) -> str:
    """A step's numbers on one line, `name value` between bars."""
    shown = [f"{name} {done.metrics[key]:{form}}" for key, (name, form) in METRICS.items() if key in done.metrics]
    if errors := int(done.metrics.get("reward_errors", 0)):
        shown.insert(1, f"reward errors {errors}")
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in done.seconds.items())
    shown.append(f"{done.timings['step_s']:.1f}s ({phases})")
    kinds = [name for name in ("sampling", "training") if f"{name}_tokens_per_s" in done.timings]
    rates = (f"{name} {done.timings[f'{name}_tokens_per_s']:.0f}" for name in kinds)
    shown.append("tokens/s " + " ".join(rates))
    shown.append(f"eta {clock(done.eta_s)}")
    return f"step {done.step:>{len(str(done.steps))}}/{done.steps} | " + " | ".join(shown)


def clock(seconds: float) -> str:
    """90 -> 1:30, 3690 -> 1:01:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
