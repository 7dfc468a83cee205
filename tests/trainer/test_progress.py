"""What a person sees while a run goes on."""

from __future__ import annotations

import io

import pytest

from grpo_mega.trainer import progress as module
from grpo_mega.trainer.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_step_is_a_line_that_grows(clock):
    stream = io.StringIO()
    progress = Progress(True, stream)
    progress.begin("step 1/2")
    for seconds in (1.25, 0.5):  # the second time adds
        with progress.phase("sample"):
            clock.now += seconds
    with progress.phase("reward", shown=False):
        clock.now += 0.25
    progress.note("reward 0.500")
    progress.end(" | loss 0")
    assert stream.getvalue() == "step 1/2 | sample 1.2s | sample 0.5s reward 0.500 | loss 0\n"
    assert progress.seconds == {"sample": 1.75, "reward": 0.25}
    progress.begin("step 2/2")
    assert progress.seconds == {}
    progress.say("a line of its own")  # ends the open one
    assert stream.getvalue().splitlines()[1:] == ["step 2/2", "a line of its own"]


def test_a_dot_only_after_silence(clock):
    stream = io.StringIO()
    progress = Progress(True, stream)
    with progress.phase_line("checkpoint"):
        for _ in range(50):
            clock.now += 0.1
            progress.tick()
    dots = stream.getvalue().count(".") - 1  # the seconds have a point too
    assert dots == 2 and stream.getvalue().startswith("checkpoint.") and stream.getvalue().endswith(" 5.0s\n")


def test_other_ranks_are_silent_but_keep_time(clock):
    stream = io.StringIO()
    progress = Progress(False, stream)
    progress.begin("step")
    with progress.phase("update"):
        clock.now += 3.0
        progress.tick()
    progress.end()
    assert stream.getvalue() == "" and progress.seconds == {"update": 3.0}
