"""What a batch of writes does to documents and to the log."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from services.deadline import Deadline
from services.metadata.store import Store
from shard_router.errors import DimensionMismatch, InvalidField, NotFound, VersionConflict
from shard_router.hashing import slot_of
from shard_router.model import ABSENT, Attributes, Collection, Commit, Patch, Remove, Upsert, Version, Write

MakeCollection = Callable[..., Awaitable[Collection]]
DIM = 8


def upsert(
    id: str,
    fill: float = 1.0,
    *,
    text: str | None = "some text",
    attributes: Attributes | None = None,
    if_version: Version | None = None,
) -> Upsert:
    return Upsert(id, text, attributes or {}, np.full(DIM, fill, np.float32), if_version)


async def write(store: Store, collection: Collection, *writes: Write) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(10))


async def test_an_upsert_is_read_back_whole(store: Store, collection: Collection) -> None:
    vector = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    commit = await write(store, collection, Upsert("a", "text", {"rank": 3}, vector))
    assert (commit.log_id, commit.upto) == (store.log_id, 1)
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, 1)]
    rows, vectors = await store.get(collection, ["nobody", "a"], with_vectors=True)
    assert rows[0] is None
    assert rows[1] is not None
    assert rows[1].slot == slot_of("a", collection.slots)
    assert (rows[1].id, rows[1].text, rows[1].attributes) == ("a", "text", {"rank": 3})
    assert rows[1].version == Version(1, 1)
    assert vectors is not None
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [np.zeros(DIM), vector])
    assert (await store.get(collection, ["a"], with_vectors=False))[1] is None
    assert await store.get(collection, [], with_vectors=False) == ([], None)


async def test_every_attribute_type_survives(store: Store, collection: Collection) -> None:
    documents: list[Attributes] = [
        {
            "name": "naïve \U0001f9ff 'quoted' \"twice\" \\ \n\t 名前",
            "rank": 2**63 - 1,
            "weight": 0.1 + 0.2,
            "fresh": True,
            "seen": 1_790_000_000_000_001,
            "tags": ("b", "a", "ü", ""),
        },
        {"rank": -(2**63), "weight": 5e-324, "fresh": False, "seen": -1, "tags": ()},
        {"rank": 2**53 + 1, "weight": 1.7976931348623157e308, "name": ""},
        {"weight": 3.0},
        {"weight": -1e22},
        {},
    ]
    ids = ["é", "\U0001f9ff", "a b/c", "x" * 256, "'; DROP TABLE documents_1; --", "%s{documents}"]
    writes = [upsert(id, text=id * 3, attributes=given) for id, given in zip(ids, documents, strict=True)]
    commit = await write(store, collection, *writes)
    rows, _ = await store.get(collection, ids, with_vectors=False)
    tail = await store.tail(collection, 0)
    assert commit.delta is not None
    for place, (id, given) in enumerate(zip(ids, documents, strict=True)):
        row = rows[place]
        assert row is not None
        assert (row.id, row.text, row.attributes) == (id, id * 3, given)
        assert {name: type(value) for name, value in row.attributes.items()} == {
            name: type(value) for name, value in given.items()
        }
        assert row == tail.rows[place] == commit.delta.rows[place]


async def test_text_may_be_absent_empty_or_long(store: Store, collection: Collection) -> None:
    long = "é" * 16_384
    await write(
        store, collection, *(upsert(id, text=text) for id, text in zip("abc", (None, "", long), strict=True))
    )
    rows, _ = await store.get(collection, list("abc"), with_vectors=False)
    assert [row and row.text for row in rows] == [None, "", long]


async def test_a_batch_folds_in_order_of_arrival(store: Store, collection: Collection) -> None:
    commit = await write(store, collection, upsert("a", 1), upsert("b", 2), upsert("a", 3, text="later"))
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, 1), Version(1, 2), Version(1, 3)]
    assert commit.upto == 3
    assert commit.delta is not None
    assert [(row.id, row.version.seq) for row in commit.delta.rows] == [("b", 2), ("a", 3)]
    rows, vectors = await store.get(collection, ["a"], with_vectors=True)
    assert rows[0] is not None
    assert rows[0].text == "later"
    assert vectors is not None
    assert vectors[0, 0] == 3


async def test_the_delta_is_what_a_tail_reads(store: Store, collection: Collection) -> None:
    await write(store, collection, *(upsert(id, ord(id)) for id in "abcdef"))
    commit = await write(
        store,
        collection,
        upsert("g", 7),
        Remove("a"),
        Patch("b", {"rank": 5}),
        upsert("c", 9),
        Patch("c", {"rank": 6}),
        upsert("h", 1),
        Remove("h"),
        Remove("d"),
        upsert("d", 4),
    )
    tail = await store.tail(collection, 6)
    delta = commit.delta
    assert delta is not None
    assert (
        (delta.log_id, delta.after, delta.upto)
        == (tail.log_id, tail.after, tail.upto)
        == (store.log_id, 6, 15)
    )
    assert list(delta.rows) == list(tail.rows)
    np.testing.assert_array_equal(delta.vectors, tail.vectors)
    assert [(row.id, row.deleted, row.version.seq) for row in tail.rows] == [
        ("g", False, 7),
        ("a", True, 8),
        ("b", False, 9),
        ("c", False, 11),
        ("h", True, 13),
        ("d", False, 15),
    ]
    assert tail.vectors[:, 0].tolist() == [7, 0, ord("b"), 9, 0, 4]


async def test_a_patch_keeps_text_and_vector(store: Store, collection: Collection) -> None:
    await write(store, collection, upsert("a", 5, attributes={"name": "n", "rank": 1, "fresh": True}))
    commit = await write(
        store,
        collection,
        Patch("a", {"rank": 2, "tags": ("x",)}, clear=("fresh", "weight")),
        Patch("nobody", {"rank": 1}),
    )
    assert commit.outcomes[0].version == Version(1, 2)
    assert isinstance(commit.outcomes[1].error, NotFound)
    assert commit.upto == 2
    rows, vectors = await store.get(collection, ["a"], with_vectors=True)
    assert rows[0] is not None
    assert (rows[0].text, rows[0].version) == ("some text", Version(1, 2))
    assert rows[0].attributes == {"name": "n", "rank": 2, "tags": ("x",)}
    assert vectors is not None
    assert vectors[0].tolist() == [5.0] * DIM


async def test_remove_leaves_a_tombstone_once(store: Store, collection: Collection) -> None:
    await write(store, collection, upsert("a", attributes={"rank": 1}))
    commit = await write(store, collection, Remove("a"), Remove("a"), Remove("nobody"))
    assert [(outcome.version, outcome.error) for outcome in commit.outcomes] == [
        (Version(1, 2), None),
        (None, None),
        (None, None),
    ]
    assert await store.position(collection) == commit.upto == 2
    assert (await store.get(collection, ["a"], with_vectors=False))[0] == [None]
    assert (await store.scan(collection, None, 10, with_vectors=True))[0] == []
    tail = await store.tail(collection, 0)
    assert [(row.id, row.deleted, row.text, row.attributes) for row in tail.rows] == [("a", True, None, {})]
    assert not tail.vectors.any()
    again = await write(store, collection, Remove("a"))
    assert (again.upto, again.outcomes[0].version) == (2, None)
    assert again.delta is not None
    assert (again.delta.after, again.delta.upto, list(again.delta.rows)) == (2, 2, [])
    patched = await write(store, collection, Patch("a", {"rank": 1}))
    assert isinstance(patched.outcomes[0].error, NotFound)
    back = await write(store, collection, upsert("a", 2))
    assert back.outcomes[0].version == Version(1, 3)
    assert (await store.get(collection, ["a"], with_vectors=False))[0][0] is not None


async def test_if_version_decides_row_by_row(store: Store, collection: Collection) -> None:
    await write(store, collection, upsert("a", 1), upsert("b", 2), upsert("gone"), Remove("gone"))
    commit = await write(
        store,
        collection,
        upsert("a", 10, if_version=Version(1, 1)),
        upsert("b", 20, if_version=Version(1, 1)),
        upsert("a", 11, if_version=Version(1, 1)),
        upsert("new", 30, if_version=ABSENT),
        upsert("new", 31, if_version=ABSENT),
        upsert("gone", 40, if_version=ABSENT),
        Patch("b", {"rank": 1}, if_version=Version(1, 2)),
        Remove("a", if_version=Version(1, 5)),
        Remove("nobody", if_version=Version(1, 1)),
        upsert("b", 21, if_version=Version(1, 8)),
    )
    told = [outcome.version.seq if outcome.version else outcome.error for outcome in commit.outcomes]
    conflicts = {1: Version(1, 2), 2: Version(1, 5), 4: Version(1, 6), 8: ABSENT}
    assert [seq for seq in told if isinstance(seq, int)] == [5, 6, 7, 8, 9, 10]
    for place, current in conflicts.items():
        error = told[place]
        assert isinstance(error, VersionConflict)
        assert error.current == current
    rows, vectors = await store.get(collection, ["a", "b", "new", "gone"], with_vectors=True)
    assert [row and row.version.seq for row in rows] == [None, 10, 6, 7]
    assert vectors is not None
    assert vectors[:, 0].tolist() == [0, 21, 30, 40]


async def test_concurrent_compare_and_set_lets_one_win(store: Store, collection: Collection) -> None:
    await write(store, collection, upsert("a"))
    commits = await asyncio.gather(
        *(write(store, collection, upsert("a", n, if_version=Version(1, 1))) for n in range(12))
    )
    won = [commit.outcomes[0].version for commit in commits if commit.outcomes[0].error is None]
    assert won == [Version(1, 2)]
    assert await store.position(collection) == 2


@pytest.mark.parametrize(
    "poison",
    [
        upsert("bad", text="a\x00b"),
        upsert("bad\x00"),
        upsert("bad", attributes={"name": "\x00"}),
        upsert("bad", text="\ud800"),
        upsert("".join(chr(0x4E00 + n * 37 % 20_000) for n in range(4_000))),
    ],
    ids=["nul in text", "nul in id", "nul in attribute", "lone surrogate", "id too long for the index"],
)
@pytest.mark.parametrize("conditional", [False, True])
async def test_a_document_that_cannot_be_stored_fails_alone(
    store: Store, collection: Collection, poison: Upsert, conditional: bool
) -> None:
    await write(store, collection, upsert("old"))
    writes: list[Write] = [upsert(f"{n}", n) for n in range(21)]
    writes.insert(13, poison)
    if conditional:
        writes += [Patch("old", {"rank": 1}), Remove("0")]
    commit = await write(store, collection, *writes)
    errors = {place: outcome.error for place, outcome in enumerate(commit.outcomes) if outcome.error}
    assert list(errors) == [13]
    assert isinstance(errors[13], InvalidField)
    assert errors[13].field == ""
    assert commit.delta is None
    assert commit.upto == await store.position(collection) == 22 + 2 * conditional
    assert store.stats()["bisections_total"] > 0
    tail = await store.tail(collection, 0)
    assert len(tail.rows) == 22
    by_id = {row.id: row.version for row in tail.rows}
    for one, outcome in zip(writes, commit.outcomes, strict=True):
        if one is not poison and one.id != "0":
            assert outcome.version == by_id[one.id]
    alone = await write(store, collection, poison)
    assert isinstance(alone.outcomes[0].error, InvalidField)
    assert alone.upto == commit.upto


async def test_what_is_wrong_at_sight_costs_no_transaction(store: Store, collection: Collection) -> None:
    commit = await write(
        store,
        collection,
        upsert("nan", attributes={"weight": math.nan}),
        upsert("fine"),
        Upsert("short", None, {}, np.ones(DIM - 1, np.float32)),
    )
    assert isinstance(commit.outcomes[0].error, InvalidField)
    assert commit.outcomes[1].version == Version(1, 1)
    assert isinstance(commit.outcomes[2].error, DimensionMismatch)
    assert store.stats()["bisections_total"] == 0
    nothing = await write(store, collection, upsert("nan", attributes={"weight": math.inf}))
    assert nothing.upto == await store.position(collection) == 1
    assert (await write(store, collection)).upto == 1


async def test_more_than_a_transaction_holds_is_several(store: Store, collection: Collection) -> None:
    count = 5_000
    writes = [upsert(f"{n}", n % 7) for n in range(count)]
    commit = await write(store, collection, *writes)
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, n + 1) for n in range(count)]
    assert commit.upto == count
    assert store.stats()["transactions_total"] == 3
    rows, _ = await store.get(collection, [f"{n}" for n in range(count)], with_vectors=False)
    assert all(rows)


async def test_vectors_of_every_size_survive(store: Store, make_collection: MakeCollection) -> None:
    rng = np.random.default_rng(2)
    for dim in (2, 384, 4096):
        collection = await make_collection(store, dim=dim)
        matrix = rng.standard_normal((20, dim)).astype(np.float32)
        matrix[3] = 0
        matrix[4, :2] = [np.finfo(np.float32).tiny, -np.finfo(np.float32).max]
        # every second element of a wider row: a vector that is not contiguous
        wide = np.repeat(matrix, 2, axis=1)
        await write(store, collection, *(Upsert(f"{n}", None, {}, wide[n, ::2]) for n in range(20)))
        _, vectors = await store.get(collection, [f"{n}" for n in range(20)], with_vectors=True)
        np.testing.assert_array_equal(vectors, matrix)


async def test_scan_pages_through_live_documents_in_order(store: Store, collection: Collection) -> None:
    ids = [f"doc-{n}" for n in range(300)] + ["", "Z", "z", "é"]
    await write(store, collection, *(upsert(id, n) for n, id in enumerate(ids)))
    await write(store, collection, *(Remove(f"doc-{n}") for n in range(0, 300, 3)))
    live = [id for id in ids if not (id.startswith("doc-") and int(id[4:]) % 3 == 0)]
    after: tuple[int, str] | None = None
    seen = []
    while True:
        rows, vectors = await store.scan(collection, after, 37, with_vectors=True)
        assert vectors is not None
        assert len(rows) == len(vectors) <= 37
        assert [vectors[place, 0] for place in range(len(rows))] == [ids.index(row.id) for row in rows]
        if not rows:
            break
        seen += [(row.slot, row.id) for row in rows]
        after = seen[-1]
    assert seen == sorted((slot_of(id, collection.slots), id) for id in live)
    rows, vectors = await store.scan(collection, None, 5, with_vectors=False)
    assert [(row.slot, row.id) for row in rows] == seen[:5]
    assert vectors is None


async def test_many_collections_do_not_share_a_log(store: Store, make_collection: MakeCollection) -> None:
    first, second = await make_collection(store), await make_collection(store)
    await asyncio.gather(*(write(store, first, upsert(f"{n}")) for n in range(5)))
    await write(store, second, upsert("0", 9))
    assert (await store.position(first), await store.position(second)) == (5, 1)
    assert [row.id for row in (await store.tail(second, 0)).rows] == ["0"]
