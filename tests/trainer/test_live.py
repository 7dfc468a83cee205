"""The live display: what is left on the screen, whoever else writes to it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Screen

from grpo_mega.trainer import live as module
from grpo_mega.trainer.live import sparkline
from grpo_mega.trainer.progress import progress_on

ROOT = Path(__file__).resolve().parent.parent.parent
METRICS = {"loss": 0.0, "kl": 0.0012, "clip_fraction": 0.01, "entropy": 1.5, "grad_norm": 2.2}
TIMINGS = {"step_s": 8.2, "sampling_tokens_per_s": 540.0, "training_tokens_per_s": 130.0}
HEADER = "     step  reward       kl   clip  entropy     grad sample/s  train/s       s"
ROWS = [
    "      1/3   0.250   0.0012  0.010    1.500    2.200      540      130     8.2",
    "      2/3   0.500   0.0012  0.010    1.500    2.200      540      130     8.2",
    "      3/3   0.750   0.0012  0.010    1.500    2.200      540      130     8.2",
]


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(module, "REFRESH_SECONDS", -1.0)  # every tick is shown
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Screen()


def train(progress, during=lambda step: None, **more):
    for step in (1, 2, 3):
        progress.begin_step(step, 3)
        with progress.phase("sample"):
            progress.tick()
        progress.note(f"reward {step / 4:.3f}")
        with progress.phase("update"):
            for _ in range(4):
                progress.tick()
            during(step)
        progress.end_step(METRICS | {"reward": step / 4} | more, TIMINGS)


def test_steps_become_rows_and_nothing_else_is_left(screen):
    progress = progress_on(screen)
    with progress.task("loading weights"):
        progress.tick(1, 2)
        assert screen.lines[:1] == [""] and screen.lines[1].startswith("loading weights  ━━━━━")
        assert screen.lines[1].endswith("50%  0:00") and len(screen.lines) == 2
    train(progress)
    progress.say("the end")
    assert screen.lines == ["loading weights 0.0s", HEADER, *ROWS, "the end"]
    assert all(len(line) <= 80 for line in screen.lines)


def test_without_a_reward_the_loss_takes_its_place(screen):
    progress = progress_on(screen)
    for step, loss in ((1, 2.5), (2, float("nan"))):
        progress.begin_step(step, 3)
        progress.end_step({"loss": loss, "grad_norm": 2.2}, {"step_s": 8.2, "training_tokens_per_s": 130.0})
    progress.begin_step(3, 3)
    assert screen.lines[:3] == [
        "     step    loss       kl   clip  entropy     grad sample/s  train/s       s",
        "      1/3 +2.5000        -      -        -    2.200        -      130     8.2",
        "      2/3    +nan        -      -        -    2.200        -      130     8.2",
    ]
    assert any(line.startswith("loss nan") and "▁" in line for line in screen.lines)  # a block for the one number


def test_what_is_shown_of_the_step_under_way(screen):
    seen = []
    train(progress_on(screen), lambda step: seen.append(screen.lines))
    first, _, third = seen
    assert first[-2].split() == ["step", "1/3", "update", "0:00"] and first[-1] == "reward 0.250"
    assert third[:3] == [HEADER, *ROWS[:2]] and third[3] == ""
    head, bar, rest = third[4].partition("━")
    assert head == "step 3/3  update  " and rest.split()[-4:] == ["75%", "0:00", "eta", "0:00"] and bar
    assert third[5] == "reward 0.750  ▁█"  # the rewards of the steps before
    assert third[6].startswith("last step 8.2s:") and len(third) == 7


def test_lines_of_other_processes_stay(screen):
    train(progress_on(screen), lambda step: screen.write(f"rank 1: warning {step}\n"))
    assert [line for line in screen.lines if line.startswith("rank 1")] == [f"rank 1: warning {n}" for n in (1, 2, 3)]
    assert [line for line in screen.lines if "/3 " in line and "rank" not in line] == ROWS


def test_a_failure_leaves_the_screen_clean(screen):
    progress = progress_on(screen)

    def fail(step):
        if step == 2:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train(progress, fail)
    progress.close()
    progress.tick()
    screen.write("grpo-mega: a sentence\n")
    assert screen.lines == [HEADER, ROWS[0], "grpo-mega: a sentence"]
    assert "?25" not in screen.getvalue()  # the cursor was never hidden


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal(screen, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    seen = []
    train(progress_on(screen), lambda step: seen.append(screen.lines))
    assert all(len(line) <= width for lines in seen for line in lines)
    assert len(seen[2]) == 7 and seen[2][4].startswith("step 3/3  update")


def test_no_colour_when_asked(screen, monkeypatch):
    train(progress_on(screen))
    assert "\x1b[38;5;" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Screen()
    train(progress_on(plain))
    assert "\x1b[38;" not in plain.getvalue() and plain.lines == screen.lines


def test_rewards_that_failed_are_told(screen):
    train(progress_on(screen), reward_errors=2.0)
    assert screen.lines.count("           reward errors: 2, see `error` in rollouts/") == 3


def test_the_header_comes_again(screen, monkeypatch):
    monkeypatch.setattr(module, "HEADER_EVERY", 2)
    train(progress_on(screen))
    assert screen.lines == [HEADER, *ROWS[:2], HEADER, ROWS[2]]


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃"
    assert sparkline([0.3, 0.3]) == "▁▁" and sparkline([]) == ""


STUCK = """
import multiprocessing, threading, time
from grpo_mega.trainer.progress import progress_on
progress = progress_on()
progress.watch()
with progress.task("loading"):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()  # as megatron's checkpoint writer has one, which holds the terminal open
    progress.tick(1, 2)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # as deep in a collective: no handler of the main thread can end it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stuck_rank_at_once_and_cleans_the_terminal(number):
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    screen = Screen()
    while "50%" not in screen.getvalue():
        screen.write(os.read(ours, 10000).decode())
    time.sleep(0.2)  # it is on its way from the tick to the lock
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    try:
        while data := os.read(ours, 10000):
            screen.write(data.decode())
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    os.close(ours)
    assert screen.lines == []
