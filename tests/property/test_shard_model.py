"""A replica against a dictionary: whatever is written, sealed, merged, indexed, damaged and restarted,
answers are equal."""

import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_log import MemoryLog, collection

from index_builder.segments import similarity
from services.deadline import Deadline
from services.shard.replica import Replica
from shard_router import filters
from shard_router.filters import Filter
from shard_router.model import Attributes, AttributeType, Hit, Metric

SCHEMA = {
    "rank": AttributeType.INT,
    "name": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORDS,
    "ok": AttributeType.BOOL,
}
IDS = [f"id-{i}" for i in range(24)]
FILTERS = [
    filters.check(filters.parse(text), SCHEMA)
    for text in (
        "rank < 3", 'name = "x"', 'not name = "x"', 'tags in ("p", "q") and rank >= 1',
        "ok = true or rank = 0", "exists(ok)", "rank > 100", "not exists(tags)",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Write:
    upserts: dict[str, list[int]]
    attributes: dict[str, Attributes]
    deletes: tuple[str, ...]
    pushed: bool


@dataclass(frozen=True)
class Search:
    queries: list[list[int]]
    k: int
    filter: Filter | None
    exact: bool
    exclude: frozenset[str]


@dataclass(frozen=True)
class Restart:
    """Stop and start; in between one bit may flip: in this file of that segment, counted around."""

    damaged: tuple[int, str, int] | None


@dataclass(frozen=True)
class Settle:
    """Let all upkeep finish: seals, merges, graphs."""


# Few whole numbers make many equal scores; zero vectors are in there, too.
vector = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
ids = st.sampled_from(IDS)
attributes = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(0, 5),
        "name": st.sampled_from(["x", "y"]),
        "tags": st.lists(st.sampled_from("pqr"), max_size=2).map(tuple),
        "ok": st.booleans(),
    },
)


@st.composite
def writes(draw: st.DrawFn) -> Write:
    upserts = draw(st.dictionaries(ids, vector, min_size=1, max_size=12))
    deletes = draw(st.lists(ids.filter(lambda id: id not in upserts), max_size=4, unique=True))
    return Write(
        upserts, {id: draw(attributes) for id in upserts}, tuple(deletes), pushed=draw(st.integers(0, 3)) > 0
    )


searches = st.builds(
    Search,
    st.lists(vector, min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from([None, *FILTERS]),
    st.booleans(),
    st.frozensets(ids, max_size=3),
)
damage = st.tuples(
    st.integers(0, 9), st.sampled_from(["vectors", "arrays", "index", "header"]), st.integers(0, 10_000)
)
restarts = st.builds(Restart, st.one_of(st.none(), damage))
steps = st.lists(
    st.one_of(writes(), writes(), searches, searches, restarts, st.just(Settle())),
    min_size=8,
    max_size=30,
)


def check(log: MemoryLog, metric: Metric, search: Search, query: list[int], hits: Sequence[Hit]) -> None:
    """The hits are what sorting all documents gives; of equal scores at the cut, any may be chosen."""
    allowed = {
        id: pair
        for id, pair in log.live.items()
        if id not in search.exclude
        and (search.filter is None or filters.matches(search.filter, pair[0].attributes))
    }
    prepared = similarity.prepare(np.array([query], np.float32), metric)[0]
    scores = {
        id: float(similarity.scores(prepared, similarity.prepare(raw[None], metric), metric)[0])
        for id, (_, raw) in allowed.items()
    }
    best = sorted(allowed, key=lambda id: (-scores[id], id))
    assert [hit.score for hit in hits] == [scores[id] for id in best[: search.k]]
    assert len({hit.id for hit in hits}) == len(hits)
    for hit in hits:
        row = allowed[hit.id][0]
        assert (hit.version, hit.attributes, hit.text) == (row.version, row.attributes, row.text)
        assert hit.score == scores[hit.id]
    # Ids decide between equal scores wherever no more documents share one than a part tells of.
    for _, tied in itertools.groupby(best, key=scores.__getitem__):
        if len(group := list(tied)) <= 8:
            assert [hit.id for hit in hits if hit.id in group] == [
                id for id in best[: search.k] if id in group
            ]


def flip(directory: Path, segment: int, name: str, at: int) -> bool:
    """Flip a bit of a segment's file; False where there is none."""
    found = sorted(directory.glob(f"segment-*/{name}"))
    if not found:
        return False
    path = found[segment % len(found)]
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    path.write_bytes(content)
    return True


async def run(
    steps: Sequence[Write | Search | Restart | Settle],
    metric: Metric,
    page_rows: int,
    directory: Path,
    threads: ThreadPoolExecutor,
) -> None:
    log = MemoryLog(3, page_rows=page_rows)

    async def opened() -> Replica:
        return await Replica.open(
            collection(schema=SCHEMA, metric=metric), directory=directory, log_id=log.log_id, tail=log.tail,
            search_threads=threads, memtable_rows=4, poll_ms=1, tail_rows=page_rows, graph_rows=16,
        )  # fmt: skip

    replica = await opened()
    try:
        for step in steps:
            match step:
                case Write():
                    delta = log.write(
                        {id: np.array(v, np.float32) for id, v in step.upserts.items()},
                        step.deletes,
                        step.attributes,
                    )
                    if not (step.pushed and replica.offer(delta)):
                        replica.wake()
                case Search():
                    deadline = Deadline.after(20)
                    assert await replica.wait_for(log.counter, deadline)
                    answer = await replica.search(
                        np.array(step.queries, np.float32), step.k, filter=step.filter, exact=step.exact,
                        exclude=step.exclude, deadline=deadline,
                    )  # fmt: skip
                    assert answer.position == log.counter
                    assert answer.complete
                    for query, hits in zip(step.queries, answer.hits, strict=True):
                        check(log, metric, step, query, hits)
                    passing = {
                        id: row.version
                        for id, (row, _) in log.live.items()
                        if step.filter is None or filters.matches(step.filter, row.attributes)
                    }
                    assert await replica.count(step.filter) == len(passing)
                    assert dict(await replica.matching(step.filter, 1000)) == passing
                case Restart():
                    await replica.close()
                    harm = step.damaged is not None and flip(directory, *step.damaged)
                    replica = await opened()
                    assert replica.position == log.counter
                    while replica.stats()["unverified_bytes"] or replica.condition()[0] != "serving":  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
                    assert replica.stats()["quarantined"] >= harm
                case Settle():
                    while replica.describe()["pending_rows"]:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
            replica.validate_state()
        assert replica.stats()["file_failures_total"] == 0
    finally:
        await replica.close()


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(steps, st.sampled_from(list(Metric)), st.sampled_from([3, 1000]))
def test_a_replica_answers_as_a_dictionary_would(
    steps: list[Write | Search | Restart | Settle], metric: Metric, page_rows: int
) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(2) as threads,
        # It is always calm.
        patch.multiple("services.shard.state", QUIET_S=0.0, QUIET_ROWS=3, RETRY_FIRST_S=0.01),
    ):
        asyncio.run(run(steps, metric, page_rows, Path(directory) / "shard-0", threads))
