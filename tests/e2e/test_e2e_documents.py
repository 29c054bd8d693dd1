"""Documents in, changed, read and out again; what was written with VISIBLE is what the next call sees."""

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

import grpc
import numpy as np
import pytest
from refusal import refused
from rpc import Rpc

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.documents import ABSENT, Document, Patch, Version
from ringfort.errors import Aborted, AlreadyExists, NotFound

MakeCollection = Callable[..., str]

EVERY_TYPE = {
    "name": "naïve ☃",
    "rank": -(2**63),
    "share": 0.1,
    "free": False,
    "released": datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=UTC),
    "tags": ("a", "", "ünïcode"),
}


def ids_of(client: Client, collection: str, text: str, **options: object) -> list[str]:
    return [hit.id for hit in client.search(collection, text=text, k=100, **options)]


def version_of(client: Client, collection: str, id: str) -> Version:
    (document,) = client.get(collection, [id])
    assert document is not None
    assert document.version is not None
    return document.version


# -- read your writes


def test_a_visible_write_is_found_by_the_very_next_search(client: Client, collection: str) -> None:
    for i in range(25):
        text = f"the {i}th note, about {uuid4().hex}"
        written = client.upsert(collection, [{"id": f"n{i}", "text": text}], wait="VISIBLE")
        assert written.visible
        found = client.search(collection, text=text, k=1)
        assert found[0].id == f"n{i}"
        assert found[0].score == pytest.approx(1.0, abs=1e-4)


def test_a_document_deleted_by_id_is_gone_from_the_next_search(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": f"d{i}", "text": f"document number {i}"} for i in range(20)])
    for i in range(20):
        deleted = client.delete(collection, ids=[f"d{i}"])
        assert (deleted.deleted, deleted.visible) == (1, True)
        assert f"d{i}" not in ids_of(client, collection, f"document number {i}")
    assert client.count(collection) == 0


def test_deleting_counts_what_was_there(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
    assert client.delete(collection, ids=["a", "nobody"]).deleted == 1
    assert client.delete(collection, ids=["a"]).deleted == 0
    assert client.get(collection, ["a"]) == [None]
    assert client.count(collection) == 1


def test_documents_deleted_by_filter_are_gone_from_the_next_search(client: Client, collection: str) -> None:
    client.upsert(
        collection, [{"id": f"r{i}", "text": f"text {i}", "attributes": {"rank": i}} for i in range(30)]
    )
    assert len(ids_of(client, collection, "text")) == 30
    assert client.delete(collection, filter="rank >= 10").deleted == 20
    assert sorted(ids_of(client, collection, "text")) == sorted(f"r{i}" for i in range(10))
    assert client.count(collection) == 10


def test_a_deleted_document_can_be_written_again(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "one"}])
    first = version_of(client, collection, "a")
    client.delete(collection, ids=["a"])
    client.upsert(collection, [{"id": "a", "text": "two"}])
    assert version_of(client, collection, "a") > first
    assert ids_of(client, collection, "two") == ["a"]


# -- upsert and get


def test_every_type_of_attribute_comes_back_as_it_went_in(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "all", "text": "text", "attributes": EVERY_TYPE}])
    (stored,) = client.get(collection, ["all"])
    (found,) = client.search(collection, text="text")
    assert stored is not None
    assert stored.attributes == found.attributes == EVERY_TYPE
    assert stored.text == found.text == "text"
    assert stored.version == found.version


def test_an_upsert_replaces_the_whole_document(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "cats and dogs", "attributes": {"rank": 1, "name": "x"}}])
    client.upsert(collection, [{"id": "a", "text": "stocks and bonds", "attributes": {"rank": 2}}])
    (stored,) = client.get(collection, ["a"])
    assert stored is not None
    assert (stored.text, stored.attributes) == ("stocks and bonds", {"rank": 2})
    assert client.count(collection) == 1
    assert client.count(collection, filter="exists(name)") == 0
    assert client.search(collection, text="stocks and bonds")[0].score == pytest.approx(1.0, abs=1e-4)


def test_in_one_batch_the_last_of_an_id_wins(rpc: Rpc, collection: str) -> None:
    documents = [pb.Document(id="a", text=text) for text in ("first", "second", "third")]
    written = rpc.document.Upsert(pb.UpsertRequest(collection=collection, documents=documents))
    versions = [(status.version.term, status.version.seq) for status in written.statuses]
    assert versions == sorted(set(versions))
    (stored,) = rpc.document.Get(pb.GetRequest(collection=collection, ids=["a"])).documents
    assert stored.text == "third"


def test_get_answers_in_the_order_asked_and_names_the_missing(rpc: Rpc, collection: str) -> None:
    documents = [pb.Document(id=id, text=id) for id in "abcd"]
    rpc.document.Upsert(pb.UpsertRequest(collection=collection, documents=documents))
    answer = rpc.document.Get(pb.GetRequest(collection=collection, ids=["c", "x", "a", "y"]))
    assert [document.id for document in answer.documents] == ["c", "a"]
    assert list(answer.missing) == ["x", "y"]


def test_get_includes_the_parts_asked_for(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "some text", "attributes": {"rank": 1}}])
    (whole,) = client.get(collection, ["a"], include=["text", "attributes", "vector"])
    (bare,) = client.get(collection, ["a"], include=["vector"])
    assert whole is not None
    assert whole.vector is not None
    assert bare is not None
    assert (bare.text, bare.attributes) == (None, {})
    np.testing.assert_allclose(whole.vector, client.embed(["some text"], input_type="DOCUMENT")[0], atol=1e-4)


def test_own_vectors_come_back_bit_for_bit(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=8, metric="l2")
    vectors = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    client.upsert(name, [Document(f"v{i}", vector=vector) for i, vector in enumerate(vectors)])
    stored = client.get(name, [f"v{i}" for i in range(5)], include=["vector"])
    for document, vector in zip(stored, vectors, strict=True):
        assert document is not None
        np.testing.assert_array_equal(document.vector, vector)


@pytest.mark.parametrize("dtype", ["F16", "I8"])
def test_vectors_of_a_smaller_dtype_are_kept_to_the_last_bit(
    rpc: Rpc, client: Client, make_collection: MakeCollection, dtype: str
) -> None:
    """What they say is what is stored, scored and told: half floats as they are, codes times their scale."""
    rng = np.random.default_rng(3)
    name = make_collection(dim=8, metric="inner_product")
    if dtype == "F16":
        sent = rng.normal(size=(5, 8)).astype(np.float16)
        sent[0, :4] = [6e-8, -65504, 1 / 3, -0.0]
        matrix = pb.Matrix(data=sent.tobytes(), dtype=pb.F16, rows=5, dim=8)
        meant = sent.astype(np.float32)
    else:
        codes, scales = rng.integers(-127, 128, (5, 8), np.int8), rng.random(5, np.float32)
        matrix = pb.Matrix(data=codes.tobytes(), dtype=pb.I8, rows=5, dim=8, scales=scales.tobytes())
        meant = codes * scales[:, None]
    ids = [f"v{i}" for i in range(5)]
    rpc.document.Upsert(
        pb.UpsertRequest(
            collection=name, documents=[pb.Document(id=id) for id in ids], vectors=matrix, wait=pb.VISIBLE
        )
    )
    for document, vector in zip(client.get(name, ids, include=["vector"]), meant, strict=True):
        assert document is not None
        np.testing.assert_array_equal(document.vector, vector)
    query = np.eye(8, dtype=np.float32)[1]
    found = {hit.id: hit.score for hit in client.search(name, vector=query, k=5, exact=True)}
    assert found == {id: float(vector[1]) for id, vector in zip(ids, meant, strict=True)}


# -- patch


def test_a_patch_changes_what_it_names_and_nothing_else(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "some text", "attributes": EVERY_TYPE}])
    before = client.get(collection, ["a"], include=["text", "vector"])[0]
    patched = client.patch(collection, [Patch("a", {"rank": 7, "name": None})])
    assert (patched.written, patched.visible) == (1, True)
    after = client.get(collection, ["a"], include=["text", "attributes", "vector"])[0]
    assert before is not None
    assert after is not None
    assert after.attributes == {k: v for k, v in {**EVERY_TYPE, "rank": 7}.items() if k != "name"}
    assert after.text == before.text
    np.testing.assert_array_equal(after.vector, before.vector)
    assert ids_of(client, collection, "some text", filter="rank = 7 and not exists(name)") == ["a"]
    assert ids_of(client, collection, "some text", filter="rank < 0") == []


def test_a_patch_of_nobody_fails_alone(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "one"}])
    patched = client.patch(collection, [Patch("nobody", {"rank": 1}), Patch("a", {"rank": 1})])
    (failure,) = patched.failures
    assert (failure.id, failure.code) == ("nobody", grpc.StatusCode.NOT_FOUND)
    assert failure.field == "patches[0].id"
    assert client.count(collection, filter="rank = 1") == 1
    assert client.get(collection, ["nobody"]) == [None]


# -- if_version


def test_only_the_version_asked_for_is_replaced(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": id, "text": "old"} for id in ("right", "stale")])
    stale = version_of(client, collection, "stale")
    client.upsert(collection, [{"id": "stale", "text": "newer"}])
    written = client.upsert(
        collection,
        [
            Document("right", "new", if_version=version_of(client, collection, "right")),
            Document("stale", "new", if_version=stale),
            Document("free", "new"),
            Document("fresh", "new", if_version=ABSENT),
            Document("right", "again", if_version=ABSENT),
        ],
    )
    assert written.written == 3
    assert [(f.id, f.code) for f in written.failures] == [
        ("stale", grpc.StatusCode.ABORTED),
        ("right", grpc.StatusCode.ABORTED),
    ]
    assert [failure.field for failure in written.failures] == [
        "documents[1].if_version",
        "documents[4].if_version",
    ]
    texts = {d.id: d.text for d in client.scan(collection)}
    assert texts == {"right": "new", "stale": "newer", "free": "new", "fresh": "new"}


def test_a_call_of_nothing_but_stale_versions_is_aborted(rpc: Rpc, client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "one"}])
    document = pb.Document(id="a", text="two", if_version=pb.Version(term=0, seq=0))
    request = pb.UpsertRequest(collection=collection, documents=[document])
    refusal = refused(lambda: rpc.document.Upsert(request))
    assert refusal.code is grpc.StatusCode.ABORTED
    assert (refusal.field, refusal.reason) == ("documents[0].if_version", "VERSION_CONFLICT")
    with pytest.raises(Aborted):
        client.patch(collection, [Patch("a", {"rank": 1}, if_version=Version(9, 9))])
    (stored,) = client.get(collection, ["a"])
    assert stored is not None
    assert (stored.text, stored.attributes) == ("one", {})


# -- scan and count


def test_pages_of_a_scan_hold_every_document_once_in_one_order(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": f"s{i:02}", "text": str(i)} for i in range(25)])
    pages, token = [], ""
    while True:
        page, token = client.scan_page(collection, page_size=7, page_token=token)
        pages.append([document.id for document in page])
        if not token:
            break
    assert [len(page) for page in pages[:3]] == [7, 7, 7]
    scanned = [id for page in pages for id in page]
    assert sorted(scanned) == [f"s{i:02}" for i in range(25)]
    assert [document.id for document in client.scan(collection, page_size=25)] == scanned
    assert [document.id for document in client.scan(collection)] == scanned


def test_a_scan_can_be_filtered_and_told_what_to_include(client: Client, collection: str) -> None:
    client.upsert(
        collection, [{"id": f"s{i}", "text": str(i), "attributes": {"rank": i % 5}} for i in range(50)]
    )
    found = list(client.scan(collection, filter="rank = 3", page_size=6, include=["vector"]))
    assert sorted(document.id for document in found) == sorted(f"s{i}" for i in range(3, 50, 5))
    assert all(d.text is None and not d.attributes and d.vector is not None for d in found)


def test_count_counts_what_matches(client: Client, collection: str) -> None:
    assert client.count(collection) == 0
    documents = [Document(str(i), str(i), attributes={"rank": i, "free": i % 2 == 1}) for i in range(10)]
    client.upsert(collection, documents, wait="DURABLE")
    assert client.count(collection) == 10
    assert client.count(collection, filter="rank < 4") == 4
    assert client.count(collection, filter="rank < 4 and free = true") == 2
    assert client.count(collection, filter="exists(name)") == 0


# -- collections and aliases


def test_a_collection_is_described_as_it_was_asked_for(
    client: Client, make_collection: MakeCollection
) -> None:
    name = make_collection(dim=16, metric="l2", attributes={"rank": "int"}, slots=32, shards=2)
    told = client.collection(name)
    assert (told.dim, told.metric, told.attributes) == (16, "l2", {"rank": "int"})
    assert (told.slots, told.shards, told.model, told.space) == (32, 2, "", "vectors:16")
    assert told in client.collections()
    with pytest.raises(AlreadyExists):
        client.create_collection(name, dim=16)


def test_an_alias_stands_for_its_collection_and_moves_at_once(
    client: Client, make_collection: MakeCollection
) -> None:
    alias = f"alias-{uuid4().hex[:8]}"
    first, second = make_collection(), make_collection()
    client.upsert(first, [{"id": "one", "text": "text"}])
    client.set_alias(alias, first)
    client.upsert(alias, [{"id": "two", "text": "text"}])
    assert sorted(ids_of(client, alias, "text")) == sorted(ids_of(client, first, "text")) == ["one", "two"]
    assert client.collection(first).aliases == (alias,)
    client.set_alias(alias, second)
    assert ids_of(client, alias, "text") == []
    assert client.collection(first).aliases == ()
    client.set_alias(alias, None)
    with pytest.raises(NotFound):
        client.count(alias)


def test_a_new_collection_of_an_old_name_starts_empty(
    client: Client, make_collection: MakeCollection
) -> None:
    name = make_collection()
    client.upsert(name, [{"id": "a", "text": "text"}])
    assert ids_of(client, name, "text") == ids_of(client, name, "text") == ["a"]
    client.delete_collection(name)
    with pytest.raises(NotFound):
        client.search(name, text="text")
    client.create_collection(name)
    assert ids_of(client, name, "text") == []
    assert client.count(name) == 0
