"""Scenarios in Locust's web interface.

`SCENARIO=mixed locust -f loadtests/drive/locustfile.py --host HOST:PORT`, with the extra `locust`; the
collection is the one that the driver makes. Locust's users are closed loops: each calls again once it is
answered, so a slow service is asked less and its tail looks better than it is. For figures there is
`python -m loadtests.drive`.
"""

import os
import random
import time
from collections.abc import Callable

import grpc.experimental.gevent
from locust import User, constant, task

from loadtests import corpus
from loadtests.drive.keys import chooser
from loadtests.drive.operations import COLLECTION
from loadtests.drive.scenario import Operation, read
from ringfort import Client

# Else the first call of gRPC's blocking stack would block every user.
grpc.experimental.gevent.init_gevent()

_SCENARIO = read(os.environ.get("SCENARIO", "mixed"))
_PACKAGES = corpus.read(corpus.TOP, _SCENARIO.population)
_BELOW = corpus.BUCKETS // 100


class Caller(User):  # type: ignore[misc]  # Locust has no types
    """One closed loop over the scenario's operations."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Connect."""
        self._client = Client(self.host, timeout_s=_SCENARIO.timeout_s)
        self._rng = random.Random()
        self._choose = chooser(_SCENARIO.keys, len(_PACKAGES), self._rng)
        self._began_s = time.monotonic()

    def on_stop(self) -> None:
        """Leave."""
        self._client.close()

    @task  # type: ignore[untyped-decorator]
    def call(self) -> None:
        """One call, told to Locust with its time."""
        weights = [operation.weight for operation in _SCENARIO.operations]
        [operation] = self._rng.choices(_SCENARIO.operations, weights)
        work = self._work(operation, self._choose(time.monotonic() - self._began_s))
        began_s, failure = time.perf_counter(), None
        try:
            work()
        except Exception as error:
            failure = error
        self.environment.events.request.fire(
            request_type="grpc", name=operation.name, response_length=0, exception=failure,
            response_time=(time.perf_counter() - began_s) * 1e3,
        )  # fmt: skip

    def _work(self, operation: Operation, key: int) -> Callable[[], object]:
        client, package, k, cache = self._client, _PACKAGES[key], operation.k, operation.cache
        match operation.kind:
            case "embed":
                return lambda: client.embed([package.summary])
            case "search_filtered":
                condition = f"bucket < {_BELOW}"
                return lambda: client.search(
                    COLLECTION, text=package.summary, k=k, filter=condition, cache=cache
                )
            case "search_vector":
                return lambda: client.search(COLLECTION, id=package.name, k=k, cache=cache)
            case "recommend":
                return lambda: client.recommend(COLLECTION, like=[package.name], k=k, cache=cache)
            case "upsert":
                return lambda: client.upsert(COLLECTION, [package.document()], wait=operation.wait)
        return lambda: client.search(COLLECTION, text=package.summary, k=k, cache=cache)
