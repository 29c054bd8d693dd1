"""The call that is being traced, if one is: what logs, errors and stages know of it.

Where tracing is off there is none, and all that asking costs is a look at a context variable.
"""

from collections.abc import Callable
from contextvars import ContextVar


class Trace:
    """A traced call. While it lasts `add(name, seconds, ago_s)` keeps a span that ended `ago_s` ago."""

    __slots__ = ("_add", "id")

    def __init__(self, id: str, add: Callable[[str, float, float], None]) -> None:
        """`id`: W3C's trace-id, 32 hexadecimal digits."""
        self.id = id
        self._add: Callable[[str, float, float], None] | None = add

    def took(self, name: str, seconds: float, ago_s: float = 0.0) -> None:
        """Something within the call took so long; what is told after its end is not of it."""
        if self._add is not None:
            self._add(name, seconds, ago_s)

    @property
    def open(self) -> bool:
        """Whether the call is still under way."""
        return self._add is not None

    def close(self) -> None:
        """The call has ended."""
        self._add = None


#: Of the task that asks, and of those it has started.
CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_id() -> str:
    """The trace-id of the call under way, or nothing."""
    trace = CURRENT.get()
    return trace.id if trace is not None and trace.open else ""
