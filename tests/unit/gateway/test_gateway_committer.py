import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from services.deadline import Deadline
from services.gateway.catalog import Served
from services.gateway.committer import BATCH_ROWS, Committer
from services.metadata.store import Store
from shard_router.errors import StorageUnavailable
from shard_router.model import HOME, Collection, Commit, Remove, Version, Write, WriteOutcome


class MemoryStore:
    """Commits what it is given, in order; fails the batches told."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.batches: list[list[str]] = []
        self._failing, self._upto = failing, 0

    async def write(
        self, collection: object, writes: Sequence[Write], *, deadline: Deadline, database: str
    ) -> Commit:
        self.batches.append([write.id for write in writes])
        await asyncio.sleep(0)
        if len(self.batches) - 1 in self._failing:
            raise StorageUnavailable("away")
        first = self._upto
        self._upto += len(writes)
        outcomes = [WriteOutcome(Version(1, first + at + 1)) for at in range(len(writes))]
        return Commit("log", self._upto, outcomes, None)


class Notes:
    """Notes what it is told."""

    collection = cast(Collection, type("Named", (), {"name": "c"}))

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.looks = 0

    def committed(self, database: str, commit: Commit) -> None:
        self.positions.append(commit.upto)

    def look(self) -> None:
        self.looks += 1


def committer(store: MemoryStore) -> tuple[Committer, Notes]:
    served = Notes()
    return Committer(cast(Store, cast(Any, store)), cast(Served, cast(Any, served)), HOME), served


def removes(prefix: str, count: int) -> list[Remove]:
    return [Remove(f"{prefix}{i}") for i in range(count)]


async def test_what_waits_shares_a_batch_and_what_is_large_is_cut_in_order() -> None:
    store = MemoryStore()
    writer, served = committer(store)
    calls = [writer.submit(removes(*each)) for each in (("a", 3), ("b", 2 * BATCH_ROWS + 1), ("c", 2))]
    a, b, c = await asyncio.gather(*calls)
    assert [len(batch) for batch in store.batches] == [3, BATCH_ROWS, BATCH_ROWS, 3]
    assert [id for batch in store.batches for id in batch] == [
        f"{prefix}{i}" for prefix, count in (("a", 3), ("b", 1025), ("c", 2)) for i in range(count)
    ]
    assert [each.version.seq for each in b.outcomes if each.version] == list(range(4, 4 + 1025))
    assert [each.positions for each in (a, b, c)] == [{"log": 3}, {"log": 1030}, {"log": 1030}]
    assert served.positions == [3, 515, 1027, 1030]
    await writer.close()


async def test_a_call_fails_with_any_of_its_parts_and_no_other_call_does() -> None:
    store = MemoryStore(failing=[1])
    writer, served = committer(store)
    large, small = writer.submit(removes("a", 2 * BATCH_ROWS)), writer.submit(removes("b", 1))
    with pytest.raises(StorageUnavailable):
        await large
    assert (await small).outcomes[0].version is not None
    assert served.looks == 1
    await writer.close()


async def test_what_is_committed_is_acknowledged_even_if_it_cannot_be_handed_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Notes, "committed", broken)
    writer, served = committer(MemoryStore())
    async with asyncio.timeout(30):
        done = await writer.submit(removes("a", 2))
    assert (done.positions, served.looks) == ({"log": 2}, 1)
    assert "broken" in caplog.text
    await writer.close()
