"""Threads that work behind the program's back and never hold up its end.

A pool of concurrent.futures joins its threads when the interpreter exits, after all that was submitted: one request to
a store that never answers would keep the process for good. These threads end with the process.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

_Work = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Background:
    """Calls functions in the order in which they are submitted, `num_threads` at a time."""

    def __init__(self, name: str, num_threads: int = 1) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._num_threads = num_threads
        for _ in range(num_threads):
            Thread(target=_work, args=(self._queue,), name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Begin `function(*args)` when its turn comes; a future that is cancelled before is passed over."""
        future: Future[Any] = Future()
        self._queue.put((future, function, args))
        return future

    def close(self) -> None:
        """Let the threads end once all that was submitted is done or cancelled; does not wait."""
        for _ in range(self._num_threads):
            self._queue.put(None)


def _work(queue: "SimpleQueue[_Work | None]") -> None:
    while (work := queue.get()) is not None:
        future, function, args = work
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
