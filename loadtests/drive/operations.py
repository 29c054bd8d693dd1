"""What the calls of a scenario do, on the client that applications use."""

import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate

import grpc
import numpy as np

from loadtests.corpus import BUCKETS, Package
from loadtests.drive.keys import chooser
from loadtests.drive.open_loop import Due
from loadtests.drive.scenario import Operation, Scenario
from ringfort import AsyncClient
from ringfort.errors import RingfortError

COLLECTION = "drive"


class Operations:
    """Draws what is due from a scenario: which operation, about which document."""

    def __init__(
        self,
        scenario: Scenario,
        client: AsyncClient,
        packages: Sequence[Package],
        vectors: np.ndarray,
        rng: random.Random,
    ) -> None:
        """vectors: float32 [packages, dim]."""
        self._client, self._packages, self._vectors, self._rng = client, packages, vectors, rng
        self._choose = chooser(scenario.keys, len(packages), rng)
        self._operations = scenario.operations
        self._weights = list(accumulate(operation.weight for operation in scenario.operations))

    def due(self, at_s: float) -> Due:
        """The call due at that second: its operation's name and its work."""
        [operation] = self._rng.choices(self._operations, cum_weights=self._weights)
        key = self._choose(at_s)
        return operation.name, self._work(operation, key)

    def _work(self, operation: Operation, key: int) -> Callable[[], Awaitable[object]]:
        client, package, vector = self._client, self._packages[key], self._vectors[key]
        k, cache = operation.k, operation.cache
        match operation.kind:
            case "embed":
                texts = [self._packages[row].summary for row in self._rows(key, operation.rows)]
                return lambda: client.embed(texts)
            case "search_text":
                return lambda: client.search(COLLECTION, text=package.summary, k=k, cache=cache)
            case "search_vector":
                return lambda: client.search(COLLECTION, vector=vector, k=k, cache=cache)
            case "search_filtered":
                below = max(1, round(operation.passing * BUCKETS))
                condition = f"bucket < {below}"
                return lambda: client.search(COLLECTION, vector=vector, k=k, filter=condition, cache=cache)
            case "recommend":
                return lambda: client.recommend(COLLECTION, like=[package.name], k=k, cache=cache)
            case "upsert":
                documents = [
                    self._packages[row].document(self._vectors[row])
                    for row in self._rows(key, operation.rows)
                ]
                return lambda: self._upsert(documents, operation.wait)

    async def _upsert(self, documents: Sequence[dict[str, object]], wait: str) -> None:
        result = await self._client.upsert(COLLECTION, documents, wait=wait, batch=len(documents))
        if result.failures:
            raise RuntimeError(f"{len(result.failures)} documents were refused: {result.failures[0]}")

    def _rows(self, key: int, count: int) -> list[int]:
        return [(key + i) % len(self._packages) for i in range(count)]


def code_of(error: Exception) -> str:
    """A failed call's canonical code."""
    if isinstance(error, RingfortError):
        return error.code.name
    return grpc.StatusCode.UNKNOWN.name
