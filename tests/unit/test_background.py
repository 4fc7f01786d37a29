"""Threads behind the program: in order, with errors passed on, and no hold on the end of the process."""

import subprocess
import sys
import threading

import pytest

from hydra_scale.background import Background


def test_one_thread_keeps_the_order_and_passes_errors_on() -> None:
    done: list[int] = []
    background = Background("test")
    futures = [background.submit(done.append, number) for number in range(20)]
    failing = background.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    assert done == list(range(20)) and all(future.done() for future in futures)


def test_so_many_at_a_time_and_none_that_was_cancelled() -> None:
    meeting, asked, let_go = threading.Barrier(3), threading.Event(), threading.Event()
    background = Background("test", 2)

    def hold() -> None:
        meeting.wait(30)
        asked.set()
        assert let_go.wait(30)

    held = [background.submit(hold) for _ in range(2)]
    late = background.submit(meeting.abort)
    meeting.wait(30)  # both threads came, and are busy
    assert asked.wait(30) and late.cancel()
    let_go.set()
    assert [future.result(30) for future in held] == [None, None]
    background.close()
    assert not meeting.broken


PROGRAM = """
import sys, threading
from hydra_scale.background import Background

begun = threading.Event()
background = Background("test")
background.submit(lambda: (begun.set(), threading.Event().wait()))
background.submit(print, "the next one")
assert begun.wait(30)
print("the end")
"""


def test_a_call_that_never_returns_does_not_keep_the_process() -> None:
    """A pool of concurrent.futures would."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "the end\n"), ended.stderr
