"""The watch: a thread that uses processor time is interrupted again and again, one that waits never."""

from __future__ import annotations

import subprocess
import sys

from devtool.project import ROOT

PROGRAM = """
import _thread, os, signal, sys, time
from vcpu_worker.ghosts import watch
from vcpu_worker.vcpu_thread import KICK_SIGNAL

kicks = []
signal.signal(KICK_SIGNAL, lambda number, frame: kicks.append(number))
used = []

def busy():
    watch.start()
    before = time.thread_time_ns()
    if sys.argv[1] == "busy":
        while time.thread_time_ns() - before < 300_000_000:
            pass
    else:
        time.sleep(0.5)
    used.append(time.thread_time_ns() - before)

_thread.start_new_thread(busy, ())
while not used:
    time.sleep(0.01)
print(len(kicks), used[0])
"""


def kicks(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], cwd=ROOT, check=True, capture_output=True, text=True)
    count, used = map(int, done.stdout.split())
    return count, used


def test_a_busy_thread_is_interrupted_every_ten_milliseconds_of_its_time():
    count, used = kicks("busy")
    # The kernel looks at its ticks only, and signals that come while one is pending are one.
    assert 3 <= count <= used // 10_000_000 + 1


def test_a_waiting_thread_is_left_alone():
    count, _ = kicks("idle")
    assert count == 0
