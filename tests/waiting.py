"""Waiting for a condition with a deadline: what tests do in place of sleeping and hoping."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Poll `condition` until it holds.

    Raises:
        AssertionError: with `otherwise`, when it does not hold after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds:.0f} s"
        time.sleep(0.02)
