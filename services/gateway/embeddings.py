"""Texts to vectors: the embedding cache first, the embedder for the rest.

A cached vector is the very bytes the embedder gave; its key says exactly what it was computed from, so an
entry is never stale.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.cache import keys
from services.cache.envelope import EmbeddingEntry
from services.cache.tier import CacheTier
from services.deadline import Deadline
from services.embedder.embedder import Embedded, Embedder, InputType
from shard_router.errors import InvalidField, NotFound, PreconditionFailed, SpaceMismatch
from shard_router.model import Collection


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
    """The embedding models this gateway can use; one, named by its manifest."""

    def __init__(self, embedder: Embedder, cache: CacheTier, *, ttl_s: float, max_text_bytes: int) -> None:
        self.embedder = embedder
        self.manifest = embedder.manifest
        self._cache = cache
        self._ttl_s = ttl_s
        self._max_text_bytes = max_text_bytes

    @property
    def model(self) -> str:
        """NAME@VERSION of the default model."""
        return f"{self.manifest.name}@{self.manifest.version}"

    def require_model(self, name: str, field: str = "model") -> str:
        """NAME@VERSION for a name with or without version, or none at all; NotFound for one not served."""
        if name in ("", self.manifest.name, self.model):
            return self.model
        raise NotFound("model", name, field)

    def require_space(self, collection: Collection) -> None:
        """Raise unless a text embedded here may be compared with the collection's vectors."""
        if collection.model is None:
            raise PreconditionFailed(f"collection {collection.name!r} has no model: bring a vector")
        if collection.space != self.manifest.space:
            raise SpaceMismatch(self.manifest.space, collection.space)

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
        self, texts: Sequence[str], input_type: InputType, deadline: Deadline, *, use_cache: bool = True
    ) -> Vectors:
        """A vector for every text, in order; equal texts are computed once."""
        if not use_cache:
            return self._fresh(await self.embedder.embed(texts, input_type, deadline))
        began = time.perf_counter()
        names = [
            keys.embedding_key(self.manifest.variant, input_type.value, self.manifest.dim, True, text)
            for text in texts
        ]
        n, dim = len(texts), self.manifest.dim
        out = Vectors(
            np.empty((n, dim), np.float32), np.zeros(n, np.int32), np.zeros(n, bool), np.zeros(n, bool)
        )
        missing: dict[bytes, list[int]] = {}
        for i, found in enumerate(await self._cache.get_many(names)):
            entry = None if found is None else EmbeddingEntry.decode(found.value)
            if entry is None or len(entry.array()) != dim:
                missing.setdefault(names[i], []).append(i)
                continue
            out.vectors[i] = entry.array()
            out.tokens[i], out.truncated[i], out.cached[i] = entry.tokens, entry.truncated, True
        cache_ms = (time.perf_counter() - began) * 1e3
        if not missing:
            return Vectors(out.vectors, out.tokens, out.truncated, out.cached, cache_ms=cache_ms)
        made = await self.embedder.embed([texts[rows[0]] for rows in missing.values()], input_type, deadline)
        items = []
        for j, (name, rows) in enumerate(missing.items()):
            out.vectors[rows] = made.vectors[j]
            out.tokens[rows], out.truncated[rows] = made.tokens[j], made.truncated[j]
            entry = EmbeddingEntry.of(made.vectors[j], int(made.tokens[j]), bool(made.truncated[j]))
            items.append((name, entry.encode()))
        self._cache.put_many(items, ttl_s=self._ttl_s)
        return Vectors(
            out.vectors, out.tokens, out.truncated, out.cached,
            made.queue_ms, made.tokenize_ms, made.inference_ms, cache_ms,
        )  # fmt: skip

    @staticmethod
    def _fresh(made: Embedded) -> Vectors:
        none = np.zeros(len(made.tokens), bool)
        times = (made.queue_ms, made.tokenize_ms, made.inference_ms)
        return Vectors(made.vectors, made.tokens, made.truncated, none, *times)
