"""Waiting for what another process does in its own time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(ask: Callable[[], T], within_s: float = 30.0, every_s: float = 0.01) -> T:
    """The first answer that is true; AssertionError where there is none in time."""
    until_s = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < until_s, f"not so within {within_s:g} s"
        time.sleep(every_s)
    return answer
