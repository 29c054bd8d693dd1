"""What a collection should be, as a dictionary, and a player of random calls that holds the service to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import brute_force
import grpc
import numpy as np

from ringfort import Client
from ringfort.documents import ABSENT, Document, Patch, Version, WriteToken

DIM = 8
#: So few that most writes meet a document, and a search with k = 1,000 answers with all of them.
IDS = [f"d/{n} ü" if n % 7 == 0 else f"d{n}" for n in range(90)]
SCHEMA = {
    "rank": "int",
    "name": "keyword",
    "share": "float",
    "free": "bool",
    "seen": "timestamp",
    "tags": "keywords",
}
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
#: An aggregate over a sequence: what a search that is not exact finds of the right k.
LEAST_RECALL = 0.95

Attributes = Mapping[str, Any]
Predicate = Callable[[Attributes], bool]


@dataclass(frozen=True)
class Stored:
    """A document as it should be."""

    text: str | None
    attributes: dict[str, Any]
    vector: np.ndarray


class Player:
    """Plays random calls on a collection of its own; AssertionError where an answer is wrong."""

    def __init__(self, client: Client, name: str, rng: Random) -> None:
        self._client, self._name, self._rng = client, name, rng
        self._vectors = np.random.default_rng(rng.getrandbits(32))
        self._metric = rng.choice(("cosine", "inner_product", "l2"))
        self._documents: dict[str, Stored] = {}
        #: The versions that were seen last; a write makes them old.
        self._seen: dict[str, Version] = {}
        #: Versions of which it is known that they are the stored ones.
        self._current: dict[str, Version] = {}
        self._token = WriteToken()
        self._wanted = self._found = 0
        shards = rng.choice((1, 1, 2, 3))
        client.create_collection(
            name, dim=DIM, metric=self._metric, attributes=SCHEMA, shards=shards, slots=16
        )
        self._steps: dict[Callable[[], None], int] = {
            self._upsert: 30, self._compare_and_set: 8, self._patch: 12, self._delete: 8,
            self._delete_matching: 3, self._search: 22, self._search_like: 4, self._batch_search: 6,
            self._count: 5, self._get: 8, self._scan: 5,
        }  # fmt: skip

    def play(self, steps: int) -> None:
        """So many random calls, then a look at everything."""
        for step in self._rng.choices(list(self._steps), list(self._steps.values()), k=steps):
            step()
        self.look_at_everything()

    def look_at_everything(self) -> None:
        """Scan, Get, Count and two searches of all documents."""
        self._scan_of("", lambda _: True, 37)
        self._get_of(IDS)
        assert self._client.count(self._name) == len(self._documents)
        for exact in (True, False):
            self._search_of(self._vector(), 1_000, "", lambda _: True, exact=exact)
        assert self._found >= LEAST_RECALL * self._wanted, (self._found, self._wanted)

    # -- writes

    def _upsert(self) -> None:
        ids = [self._rng.choice(IDS) for _ in range(self._rng.choice((1, 1, 3, 12, 40)))]
        documents = [self._document(id) for id in ids]
        wait = self._wait()
        # Several batches of a stream, where there are many.
        result = self._client.upsert(self._name, documents, wait=wait, batch=self._rng.choice((7, 256)))
        assert (result.written, result.failures) == (len(ids), ())
        self._token |= result.token
        for document in documents:
            self._put(document)

    def _compare_and_set(self) -> None:
        """Conditional writes in one batch; which of them hold is decided one after the other."""
        ids = self._rng.sample(IDS, 6)
        documents = [self._document(id, if_version=self._condition(id)) for id in ids]
        expected = [d.id for d in documents if d.if_version == self._current.get(d.id, ABSENT)]
        # Not as a stream: its batches would be sent again where the service went away.
        result = self._client.upsert(self._name, documents, wait=self._wait())
        assert result.written == len(expected)
        assert {(failure.id, failure.code) for failure in result.failures} == {
            (id, grpc.StatusCode.ABORTED) for id in ids if id not in expected
        }
        self._token |= result.token
        for document in documents:
            if document.id in expected:
                self._put(document)

    def _condition(self, id: str) -> Version:
        """The stored version, an old one, or none."""
        if id in self._documents and id not in self._current:
            self._get_of([id])
        return self._rng.choice((self._current.get(id, ABSENT), self._seen.get(id, ABSENT), ABSENT))

    def _patch(self) -> None:
        patches = []
        for id in self._rng.sample(IDS, self._rng.choice((1, 2, 10))):
            cleared = dict.fromkeys(self._rng.sample(list(SCHEMA), self._rng.randrange(3)))
            patches.append(Patch(id, {**cleared, **self._attributes(most=3)}))
        here = [patch for patch in patches if patch.id in self._documents]
        if not here:
            return
        result = self._client.patch(self._name, patches, wait=self._wait())
        assert result.written == len(here)
        assert {(failure.id, failure.code) for failure in result.failures} == {
            (patch.id, grpc.StatusCode.NOT_FOUND) for patch in patches if patch not in here
        }
        self._token |= result.token
        for patch in here:
            before = self._documents[patch.id]
            attributes = {
                name: value
                for name, value in {**before.attributes, **patch.attributes}.items()
                if value is not None
            }
            self._documents[patch.id] = Stored(before.text, attributes, before.vector)
            self._current.pop(patch.id, None)

    def _delete(self) -> None:
        ids = self._rng.sample(IDS, self._rng.choice((1, 5, 20)))
        result = self._client.delete(self._name, ids=ids, wait=self._wait())
        assert result.deleted == sum(id in self._documents for id in ids)
        self._token |= result.token
        self._drop(ids)

    def _delete_matching(self) -> None:
        filter, passes = self._filter()
        ids = [id for id, stored in self._documents.items() if passes(stored.attributes)]
        result = self._client.delete(self._name, filter=filter, wait=self._wait())
        assert result.deleted == len(ids), filter
        self._token |= result.token
        self._drop(ids)

    def _put(self, document: Document) -> None:
        assert document.vector is not None
        self._documents[document.id] = Stored(document.text, dict(document.attributes), document.vector)
        self._current.pop(document.id, None)

    def _drop(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._documents.pop(id, None)
            self._current.pop(id, None)

    # -- reads

    def _search(self) -> None:
        filter, passes = ("", lambda _: True) if self._rng.random() < 0.4 else self._filter()
        k = self._rng.choice((1, 3, 10, 1_000))
        self._search_of(self._vector(), k, filter, passes, exact=self._rng.random() < 0.5)

    def _search_of(
        self, query: np.ndarray, k: int, filter: str, passes: Predicate, *, exact: bool, but: str = ""
    ) -> None:
        hits = self._client.search(
            self._name, vector=query if not but else None, id=but or None, k=k, filter=filter or None,
            exact=exact, include=["attributes", "text"], read_after=self._token,
        )  # fmt: skip
        told = [(hit.id, hit.score) for hit in hits]
        right = self._best(query, k, passes, but)
        self._check(told, right, exact=exact)
        for hit in hits:
            stored = self._documents[hit.id]
            assert (hit.text, hit.attributes) == (stored.text, stored.attributes)

    def _search_like(self) -> None:
        if self._documents:
            id = self._rng.choice(list(self._documents))
            filter, passes = self._filter()
            self._search_of(self._documents[id].vector, 5, filter, passes, exact=True, but=id)

    def _batch_search(self) -> None:
        filter, passes = self._filter()
        queries = np.stack([self._vector() for _ in range(3)])
        k = self._rng.choice((2, 20))
        result = self._client.batch_search(
            self._name, vectors=queries, k=k, filter=filter, exact=True, read_after=self._token
        )
        for query, ids, scores in zip(queries, result.ids, result.scores, strict=True):
            told = list(zip(ids, scores.tolist(), strict=False))[: len(ids)]
            self._check(told, self._best(query, k, passes), exact=True)

    def _best(self, query: np.ndarray, k: int, passes: Predicate, but: str = "") -> dict[str, float]:
        """The right k with their scores, best first."""
        ids = [id for id, stored in self._documents.items() if id != but and passes(stored.attributes)]
        if not ids:
            return {}
        vectors = np.stack([self._documents[id].vector for id in ids])
        scores = brute_force.scores(self._metric, query, vectors)
        order = np.argsort(-scores, kind="stable")[:k]
        return {ids[row]: float(scores[row]) for row in order}

    def _check(self, told: Sequence[tuple[str, float]], right: Mapping[str, float], *, exact: bool) -> None:
        assert len(told) == len({id for id, _ in told}) == len(right)
        scores = [score for _, score in told]
        assert scores == sorted(scores, reverse=True)
        for id, score in told:
            if id in right:
                assert np.isclose(score, right[id], rtol=1e-4, atol=1e-4), id
        matched = sum(id in right for id, _ in told)
        if exact:
            # Of two that score alike at the cut, either may be told.
            np.testing.assert_allclose(scores, list(right.values()), rtol=1e-4, atol=1e-4)
        else:
            self._wanted, self._found = self._wanted + len(right), self._found + matched

    def _count(self) -> None:
        filter, passes = self._filter()
        right = sum(passes(stored.attributes) for stored in self._documents.values())
        assert self._client.count(self._name, filter=filter) == right, filter

    def _get(self) -> None:
        self._get_of([self._rng.choice(IDS) for _ in range(self._rng.choice((1, 5, 30)))])

    def _get_of(self, ids: Sequence[str]) -> None:
        documents = self._client.get(self._name, ids, include=["attributes", "text", "vector"])
        for id, document in zip(ids, documents, strict=True):
            assert (document is not None) == (id in self._documents), id
            if document is not None:
                self._same(document)

    def _scan(self) -> None:
        filter, passes = self._filter()
        self._scan_of(filter, passes, self._rng.choice((1, 13, 256)))

    def _scan_of(self, filter: str, passes: Predicate, page_size: int) -> None:
        include = ["attributes", "text", "vector"]
        documents = list(
            self._client.scan(self._name, filter=filter or None, include=include, page_size=page_size)
        )
        right = {id for id, stored in self._documents.items() if passes(stored.attributes)}
        assert [document.id for document in documents] != [] or not right
        assert len(documents) == len(right)
        assert {document.id for document in documents} == right
        for document in documents:
            self._same(document)

    def _same(self, document: Document) -> None:
        stored = self._documents[document.id]
        assert (document.text, document.attributes) == (stored.text, stored.attributes)
        np.testing.assert_array_equal(document.vector, stored.vector)
        assert document.version is not None
        seen = self._seen.get(document.id, ABSENT)
        known = self._current.get(document.id)
        assert document.version == known if known is not None else document.version > seen
        self._seen[document.id] = self._current[document.id] = document.version

    # -- chance

    def _wait(self) -> str:
        return self._rng.choice(("VISIBLE", "DURABLE"))

    def _vector(self) -> np.ndarray:
        return self._vectors.normal(size=DIM).astype(np.float32)

    def _document(self, id: str, if_version: Version | None = None) -> Document:
        text = self._rng.choice((None, "", f"text of {id} ☃ {self._rng.random()}"))
        return Document(id, text, self._vector(), self._attributes(most=6), if_version=if_version)

    def _attributes(self, most: int) -> dict[str, Any]:
        return {
            name: self._value(name) for name in self._rng.sample(list(SCHEMA), self._rng.randrange(most + 1))
        }

    def _value(self, name: str) -> Any:
        match name:
            case "rank":
                return self._rng.randrange(-5, 15)
            case "name":
                return self._rng.choice(("", "a", "b", "ü"))
            case "share":
                return self._rng.choice((0.0, 0.1, 2.5, -1e300))
            case "free":
                return self._rng.random() < 0.5
            case "seen":
                return EPOCH + timedelta(microseconds=self._rng.randrange(10))
            case _:
                return tuple(self._rng.sample(("x", "y", "z"), self._rng.randrange(4)))

    def _filter(self, depth: int = 2) -> tuple[str, Predicate]:
        """A filter as text, and what it says in Python: a comparison with what is not there is false."""
        kind = self._rng.choice(("all", "any", "not") if depth and self._rng.random() < 0.5 else ("leaf",))
        if kind == "not":
            text, passes = self._filter(depth - 1)
            return f"not ({text})", lambda a: not passes(a)
        if kind in ("all", "any"):
            (left, first), (right, second) = self._filter(depth - 1), self._filter(depth - 1)
            if kind == "all":
                return f"({left}) and ({right})", lambda a: first(a) and second(a)
            return f"({left}) or ({right})", lambda a: first(a) or second(a)
        return self._leaf()

    def _leaf(self) -> tuple[str, Predicate]:
        name = self._rng.choice(list(SCHEMA))
        if self._rng.random() < 0.2:
            return f"exists({name})", lambda a: name in a
        value = self._value(name)
        match name:
            case "rank" | "share":
                op, holds = self._rng.choice(
                    (("<", lambda a, b: a < b), (">=", lambda a, b: a >= b), ("!=", lambda a, b: a != b))
                )
                return f"{name} {op} {value!r}", lambda a: name in a and holds(a[name], value)
            case "free":
                return f"free = {str(value).lower()}", lambda a: a.get("free") is value
            case "seen":
                return f'seen <= "{value.isoformat()}"', lambda a: name in a and a[name] <= value
            case "tags":
                word = self._rng.choice(("x", "y", "nobody"))
                return f'tags = "{word}"', lambda a: word in a.get("tags", ())
            case _:
                return f'name in ("{value}", "a")', lambda a: a.get("name") in (value, "a")
