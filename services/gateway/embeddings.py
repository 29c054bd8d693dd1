"""Texts to vectors: the embedding cache first, the embedder for the rest.

A cached vector is the very bytes the embedder gave; its key says exactly what it was computed from, so an
entry is never stale.
"""

import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from services.cache import keys
from services.cache.envelope import EmbeddingEntry
from services.cache.single_flight import SingleFlight
from services.cache.tier import CacheTier
from services.cache.worth import Worth
from services.deadline import Deadline
from services.embedder.embedder import Embedded, InputType
from services.gateway.endpoints import EmbedderEndpoint
from shard_router.errors import InvalidField

#: A look into Redis costs a tenth of embedding a short text, a write half as much; less than that for texts
#: by the dozen. So many at once are somebody's bulk, which may have to be sent again.
LEAST_FOUND, MANY_TEXTS = 0.1, 64


@dataclass(frozen=True, slots=True)
class Vectors:
    """Embedded texts: float32 [n, dim], tokens int32 [n], truncated and cached bool [n], and milliseconds."""

    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    cached: np.ndarray
    queue_ms: float = 0.0
    tokenize_ms: float = 0.0
    inference_ms: float = 0.0
    cache_ms: float = 0.0


class Embeddings:
    """One embedding model, and the cache before it."""

    def __init__(
        self, embedder: EmbedderEndpoint, cache: CacheTier, *, ttl_s: float, max_text_bytes: int
    ) -> None:
        self.embedder = embedder
        self.manifest = embedder.manifest
        self._cache = cache
        self._ttl_s = ttl_s
        self._max_text_bytes = max_text_bytes
        self._redis = Worth(LEAST_FOUND)
        self._flights = SingleFlight()

    def check_texts(self, texts: Sequence[str], field: str, *, truncate: bool) -> list[str]:
        """Texts within the byte limit; a longer one is cut where `truncate` says so, else InvalidField."""
        return [self.check_text(text, f"{field}[{i}]", truncate=truncate) for i, text in enumerate(texts)]

    def check_text(self, text: str, field: str, *, truncate: bool) -> str:
        """One text, checked; cut texts end at a whole character."""
        limit = self._max_text_bytes
        if len(text) * 4 <= limit:
            return text
        raw = text.encode()
        if len(raw) <= limit:
            return text
        if not truncate:
            raise InvalidField(field, f"{len(raw)} bytes, the limit is {limit}")
        return raw[:limit].decode(errors="ignore")

    async def embed(
        self,
        texts: Sequence[str],
        input_type: InputType,
        deadline: Deadline,
        *,
        use_cache: bool = True,
        lease: bool = False,
    ) -> Vectors:
        """A vector for every text, in order; equal texts are computed once.

        With `lease`, and where other gateways use the same Redis, what another call is computing, there or
        here, is waited for once all the rest has been computed: for callers of whom nobody else sees to that.
        """
        if not use_cache:
            return self._fresh(await self.embedder.embed(texts, input_type, deadline))
        began = time.perf_counter()
        variant, dim = self.manifest.variant, self.manifest.dim
        names = [keys.embedding_key(variant, input_type.value, dim, True, text) for text in texts]
        far = frozenset(names if len(names) >= MANY_TEXTS else filter(self._redis.pays, names))
        known = await self._look_up(names, far)
        cache_ms = (time.perf_counter() - began) * 1e3
        missing: dict[bytes, list[int]] = {}
        for i, name in enumerate(names):
            if name not in known:
                missing.setdefault(name, []).append(i)
        if not missing:
            return self._merged(names, known, cache_ms)
        if lease and self._cache.shared and far >= missing.keys():
            by_name = {name: texts[rows[0]] for name, rows in missing.items()}

            async def leased() -> Vectors:
                found, made = await self._leased(by_name, input_type, deadline)
                made_rows = [missing[name] for name in by_name if name not in found]
                return self._merged(names, {**known, **found}, cache_ms, made_rows, made)

            # A crowd that wants one text asks Redis for it once.
            return await (self._flights.run(names[0], leased) if len(names) == 1 else leased())
        if len(missing) == len(names):
            made = await self.embedder.embed(texts, input_type, deadline)
            self._keep(names, made, far)
            return self._fresh(made, cache_ms)
        wanted = [texts[rows[0]] for rows in missing.values()]
        made = await self.embedder.embed(wanted, input_type, deadline)
        self._keep(list(missing), made, far)
        return self._merged(names, known, cache_ms, list(missing.values()), made)

    async def _leased(
        self, texts: Mapping[bytes, str], input_type: InputType, deadline: Deadline
    ) -> tuple[dict[bytes, EmbeddingEntry], Embedded | None]:
        """What other calls made of these texts meanwhile, by name, and the rest, in order, made here."""
        names = list(texts)
        made: list[tuple[Sequence[int], Embedded]] = []

        async def find(places: Sequence[int]) -> Mapping[int, EmbeddingEntry | None]:
            values = await self._cache.look_behind_many([names[place] for place in places])
            entries = {place: self._entry(values.get(names[place])) for place in places}
            return {place: entry for place, entry in entries.items() if entry is not None}

        async def make(places: Sequence[int]) -> Sequence[EmbeddingEntry | None]:
            mine = [names[place] for place in places]
            embedded = await self.embedder.embed([texts[name] for name in mine], input_type, deadline)
            self._keep(mine, embedded, frozenset(mine))
            made.append((places, embedded))
            return [None] * len(mine)

        leases = [keys.lease_key(name, {}) for name in names]
        entries = await self._cache.leases.run_many(
            leases, find, make, deadline, soon=lambda entry: entry is None
        )
        found = {name: entry for name, entry in zip(names, entries, strict=True) if entry is not None}
        return found, _joined(made)

    def _entry(self, value: bytes | None) -> EmbeddingEntry | None:
        """What a cache holds, if it is a vector of this model."""
        entry = None if value is None else EmbeddingEntry.decode(value)
        return entry if entry is not None and len(entry.vector) == 4 * self.manifest.dim else None

    async def _look_up(self, names: Sequence[bytes], far: AbstractSet[bytes]) -> dict[bytes, EmbeddingEntry]:
        """What the cache knows, by name; Redis is asked only for those in `far`."""
        near = await self._cache.get_many(names, far=False)
        values = {name: found.value for name, found in zip(names, near, strict=True) if found is not None}
        looked = far - values.keys()
        if looked:
            values.update(await self._cache.look_behind_many(list(looked)))
        known = {name: entry for name, value in values.items() if (entry := self._entry(value)) is not None}
        self._redis.count(looked, known)
        return known

    def _keep(self, names: Sequence[bytes], made: Embedded, far: AbstractSet[bytes]) -> None:
        """Hold what was made, in Redis only those in `far`."""
        rows = zip(names, made.vectors, made.tokens.tolist(), made.truncated.tolist(), strict=True)
        entries = [(name, EmbeddingEntry.of(vector, t, cut).encode()) for name, vector, t, cut in rows]
        for behind in (True, False):
            some = [entry for entry in entries if (entry[0] in far) is behind]
            self._cache.put_many(some, ttl_s=self._ttl_s, far=behind)

    def _merged(
        self,
        names: Sequence[bytes],
        known: Mapping[bytes, EmbeddingEntry],
        cache_ms: float,
        missing: Sequence[Sequence[int]] = (),
        made: Embedded | None = None,
    ) -> Vectors:
        """Known rows, and `made` where they were missing: row j of it stands at all of `missing[j]`."""
        n = len(names)
        vectors = np.empty((n, self.manifest.dim), np.float32)
        tokens, truncated, cached = np.zeros(n, np.int32), np.zeros(n, bool), np.zeros(n, bool)
        for i, name in enumerate(names):
            if (entry := known.get(name)) is not None:
                vectors[i] = entry.array()
                tokens[i], truncated[i], cached[i] = entry.tokens, entry.truncated, True
        if made is None:
            return Vectors(vectors, tokens, truncated, cached, cache_ms=cache_ms)
        for j, rows in enumerate(missing):
            vectors[rows], tokens[rows], truncated[rows] = made.vectors[j], made.tokens[j], made.truncated[j]
        times = (made.queue_ms, made.tokenize_ms, made.inference_ms)
        return Vectors(vectors, tokens, truncated, cached, *times, cache_ms)

    @staticmethod
    def _fresh(made: Embedded, cache_ms: float = 0.0) -> Vectors:
        none = np.zeros(len(made.tokens), bool)
        times = (made.queue_ms, made.tokenize_ms, made.inference_ms)
        return Vectors(made.vectors, made.tokens, made.truncated, none, *times, cache_ms)


def _joined(made: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded | None:
    """What was made at several times of some places each, in order of the places; None for nothing."""
    if len(made) <= 1:
        return made[0][1] if made else None
    parts = [part for _, part in made]
    order = np.argsort([place for places, _ in made for place in places])
    return Embedded(
        np.concatenate([part.vectors for part in parts])[order],
        np.concatenate([part.tokens for part in parts])[order],
        np.concatenate([part.truncated for part in parts])[order],
        sum(part.queue_ms for part in parts),
        sum(part.tokenize_ms for part in parts),
        sum(part.inference_ms for part in parts),
    )
