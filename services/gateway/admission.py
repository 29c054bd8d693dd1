"""Who is let in: an in-flight cap for the whole gateway and a rate for each key. Time is an argument."""

from dataclasses import dataclass

from shard_router.errors import Overloaded, QuotaExceeded, Unavailable


@dataclass(slots=True)
class Bucket:
    """A token bucket: `tokens` left as of `at_s`."""

    tokens: float
    at_s: float


class Admission:
    """Lets calls in while fewer than `max_in_flight` are under way and their key has tokens left."""

    def __init__(self, *, max_in_flight: int, rate_per_key: float = 0.0, burst_s: float = 1.0) -> None:
        self.max_in_flight = max_in_flight
        self.rate_per_key = rate_per_key
        self.burst = max(rate_per_key * burst_s, 1.0)
        #: 0 <= in_flight <= max_in_flight
        self.in_flight = 0
        self.refused = 0
        self._closed = False
        #: By key; as many as there are keys in the configuration.
        self._buckets: dict[str, Bucket] = {}

    def enter(self, key: str, now_s: float) -> None:
        """Count one call in; whoever entered calls `leave` once.

        Overloaded, QuotaExceeded or, after `close`, Unavailable where it may not.
        """
        if self._closed:
            self.refused += 1
            raise Unavailable("the service is shutting down")
        if self.in_flight >= self.max_in_flight:
            self.refused += 1
            raise Overloaded("the gateway's in-flight limit", self.max_in_flight)
        if self.rate_per_key > 0:
            self._take(key, now_s)
        self.in_flight += 1

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True

    def leave(self) -> None:
        """Count one call out."""
        self.in_flight -= 1

    def stats(self) -> dict[str, float]:
        """Calls under way, how many may be, and calls refused at the door."""
        return {
            "in_flight": self.in_flight,
            "in_flight_limit": self.max_in_flight,
            "refused_total": self.refused,
        }

    def _take(self, key: str, now_s: float) -> None:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self.burst, now_s)
        bucket.tokens = min(self.burst, bucket.tokens + (now_s - bucket.at_s) * self.rate_per_key)
        bucket.at_s = now_s
        if bucket.tokens < 1:
            self.refused += 1
            wait_ms = int((1 - bucket.tokens) / self.rate_per_key * 1000) + 1
            raise QuotaExceeded("this key", self.rate_per_key, wait_ms)
        bucket.tokens -= 1
