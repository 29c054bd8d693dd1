"""How Redis is doing, as its users find it: the breaker with a clock, counters and a line in the log."""

import asyncio
import logging
import time
from collections.abc import Callable

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache.breaker import Breaker, Down

logger = logging.getLogger(__name__)


class Health:
    """One view of Redis for reads, writes and probes; an outage is logged when it begins and when it ends.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.errors = 0
        self.timeouts = 0
        self.outages = 0
        #: Set when the breaker opens; whoever waits for it clears it.
        self.opened = asyncio.Event()
        self._breaker = breaker
        self._clock = clock
        self._away = False

    @property
    def allows(self) -> bool:
        """Whether an operation may run now."""
        return self._breaker.allows

    @property
    def probe_due_s(self) -> float | None:
        """Seconds until the next probe is due; None while operations run."""
        state = self._breaker.state
        return max(0.0, state.retry_at_s - self._clock()) if isinstance(state, Down) else None

    def succeeded(self) -> None:
        """An operation came back in time."""
        self._breaker.succeeded()
        if self._away and self._breaker.allows:
            self._away = False
            logger.info("redis is back")

    def failed(self, error: Exception) -> None:
        """An operation failed or, with a timeout's error, took too long."""
        self._count(error)
        if self._breaker.failed(self._clock()):
            self._begin_outage(error)

    def probed(self, error: Exception | None) -> None:
        """A probe of a server that was away, or not yet known, came through or failed."""
        self._breaker.probed(error is None, self._clock())
        if error is not None:
            self._count(error)
            self._begin_outage(error)

    def _count(self, error: Exception) -> None:
        if isinstance(error, (RedisTimeoutError, TimeoutError)):
            self.timeouts += 1
        else:
            self.errors += 1
        if not isinstance(error, (RedisError, OSError)):
            logger.error("an operation on redis failed in our own code", exc_info=error)

    def _begin_outage(self, error: Exception) -> None:
        self.opened.set()
        if not self._away:
            self._away = True
            self.outages += 1
            logger.warning("redis is away, going on without it: %s", error)
