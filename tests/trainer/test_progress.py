"""What a person sees while a run goes on where there is no terminal, and the stopwatch."""

from __future__ import annotations

import io

import pytest
from terminal import Screen

from grpo_mega.trainer import progress as module
from grpo_mega.trainer.live import Live
from grpo_mega.trainer.progress import Lines, Progress, clock, progress_on

METRICS = {"reward": 0.5, "loss": -0.001, "kl": 0.02, "clip_fraction": 0.01, "entropy": 1.5, "grad_norm": 2.25}
TIMINGS = {"step_s": 3.5, "sampling_tokens_per_s": 540.4, "training_tokens_per_s": 130.0}


@pytest.fixture
def clock_(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def step(progress, clock_, number, steps, *, ticks=0, seconds=0.5, **metrics):
    progress.begin_step(number, steps)
    with progress.phase("sample"):
        clock_.now += 1.25
    with progress.phase("update"):
        for _ in range(ticks):
            progress.tick()
            clock_.now += seconds
    progress.end_step(METRICS | metrics, TIMINGS)


def test_a_step_is_one_line_written_at_once(clock_):
    stream = io.StringIO()
    writes = []
    stream.write = writes.append
    progress = Progress(Lines(stream))
    step(progress, clock_, 9, 10, ticks=1, seconds=0.25)
    assert progress.seconds == {"sample": 1.25, "update": 0.25}
    assert writes == [
        "step  9/10 | reward 0.500 | loss -0.0010 | kl 0.0200 | clip 0.010 | entropy 1.500 | grad 2.250 | "
        "3.5s (sample 1.2, update 0.2) | tokens/s sampling 540 training 130 | eta 0:02\n"
    ]
    progress.begin_step(10, 10)
    assert progress.seconds == {}


def test_what_a_step_lacks_and_what_went_wrong(clock_):
    stream = io.StringIO()
    progress = Progress(Lines(stream))
    progress.begin_step(1, 1)
    progress.end_step({"loss": 2.5}, {"step_s": 3.5, "training_tokens_per_s": 130.0})  # on demonstrations
    assert stream.getvalue() == "step 1/1 | loss +2.5000 | 3.5s () | tokens/s training 130 | eta 0:00\n"
    stream.truncate(stream.seek(0))
    progress.begin_step(1, 1)
    progress.end_step({"reward": 0.5, "reward_errors": 3.0}, TIMINGS)
    assert stream.getvalue().startswith("step 1/1 | reward 0.500 | reward errors 3 | 3.5s ")


def test_long_work_says_how_far_it_is_on_a_line_of_its_own(clock_):
    stream = io.StringIO()
    progress = Progress(Lines(stream))
    step(progress, clock_, 1, 2, ticks=10, seconds=0.9)  # the first time nobody knows how many ticks will come
    step(progress, clock_, 2, 2, ticks=10, seconds=0.9)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  step 1/2: update 2s 5s"  # 3.05 s and 6.65 s after the step began
    assert lines[2] == "  step 2/2: update 20% 60%"
    assert [line[:8] for line in (lines[1], lines[3])] == ["step 1/2", "step 2/2"] and len(lines) == 4


def test_tasks_between_steps(clock_):
    stream = io.StringIO()
    progress = Progress(Lines(stream))
    with progress.task("loading weights"):
        for done in range(1, 11):
            clock_.now += 1.0
            progress.tick(done, 10)
    with progress.task("accuracy", " after 3 steps") as task:
        clock_.now += 2.0
        task.result = "0.250"
    progress.say("the end")
    assert stream.getvalue() == "loading weights 40% 80% 10.0s\naccuracy after 3 steps: 0.250, 2.0s\nthe end\n"


def test_a_failure_ends_the_open_line(clock_):
    stream = io.StringIO()
    progress = Progress(Lines(stream))
    with pytest.raises(ArithmeticError), progress.task("loading"):
        raise ArithmeticError
    progress.close()
    assert stream.getvalue() == "loading\n"
    progress.say("nothing more")
    assert stream.getvalue() == "loading\n"


def test_the_estimate_is_by_the_last_steps(clock_):
    seen = []

    class Listener(Lines):
        def end_step(self, done):
            seen.append(done.eta_s)

    progress = Progress(Listener(io.StringIO()))
    for number in range(1, 13):
        progress.begin_step(number, 100)
        clock_.now += 100.0 if number == 1 else 2.0
        progress.end_step(METRICS, TIMINGS)
        clock_.now += 1.0  # an evaluation, a checkpoint
    assert seen[0] == 9900 and seen[1] == pytest.approx((103 / 2) * 98)
    assert seen[-1] == pytest.approx((10 * 2 + 9) / 10 * 88)  # the slow first step is forgotten


def test_other_ranks_are_silent_but_keep_time(clock_):
    progress = progress_on(speaks=False)
    progress.say("nothing")
    step(progress, clock_, 1, 1, ticks=2)
    assert progress.display is None and progress.seconds == {"sample": 1.25, "update": 1.0}


@pytest.mark.parametrize(
    ("stream", "environment", "kind"),
    [
        (io.StringIO, {"TERM": "xterm"}, Lines),
        (Screen, {"TERM": "xterm"}, Live),
        (Screen, {"TERM": "dumb"}, Lines),
        (Screen, {"TERM": "xterm", "COLUMNS": "30"}, Lines),
        (Screen, {"TERM": "xterm", "LINES": "5"}, Lines),
    ],
)
def test_live_only_where_it_can_be(monkeypatch, stream, environment, kind):
    for name, value in ({"COLUMNS": "80", "LINES": "24"} | environment).items():
        monkeypatch.setenv(name, value)
    assert type(progress_on(stream()).display) is kind


def test_an_encoding_that_lacks_a_character():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    progress_on(stream).say("fünf")
    assert stream.buffer.getvalue() == b"f?nf\n"


def test_clock():
    assert [clock(s) for s in (0, 9.6, 90, 3690)] == ["0:00", "0:10", "1:30", "1:01:30"]
