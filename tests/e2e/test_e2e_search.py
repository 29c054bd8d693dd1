"""Search against the right answer: by vector, text and id, one by one and in batches, over any shards."""

from collections.abc import Callable, Iterator
from uuid import uuid4

import brute_force
import numpy as np
import pytest
from rpc import Rpc

from protos.ringfort import v1 as pb
from ringfort import Client

MakeCollection = Callable[..., str]

ROWS, DIM, QUERIES = 1_300, 32, 20
IDS = [f"v{i:04}" for i in range(ROWS)]
RNG = np.random.default_rng(11)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
ASKED = RNG.normal(size=(QUERIES, DIM)).astype(np.float32)
METRICS = ("cosine", "inner_product", "l2")


@pytest.fixture(scope="module")
def by_metric(client: Client) -> Iterator[dict[str, str]]:
    """A collection of the same vectors for each metric; most of it sealed into segments."""
    names = {metric: f"m-{uuid4().hex[:12]}" for metric in METRICS}
    for metric, name in names.items():
        client.create_collection(name, dim=DIM, metric=metric)
        client.upsert(name, [{"id": id, "vector": v} for id, v in zip(IDS, VECTORS, strict=True)], batch=100)
    yield names
    for name in names.values():
        client.delete_collection(name)


def recall(found: list[str], wanted: list[str]) -> float:
    return len(set(found) & set(wanted)) / len(wanted)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("metric", METRICS)
def test_an_exact_search_is_the_right_answer(
    client: Client, by_metric: dict[str, str], metric: str, k: int
) -> None:
    for query in ASKED:
        found = client.search(by_metric[metric], vector=query, k=k, exact=True)
        wanted = brute_force.scores(metric, query, VECTORS)
        assert [hit.id for hit in found] == brute_force.best(wanted, IDS, k)
        np.testing.assert_allclose(
            [hit.score for hit in found], np.sort(wanted)[::-1][:k], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("metric", METRICS)
def test_an_ordinary_search_is_almost_the_right_answer(
    client: Client, by_metric: dict[str, str], metric: str
) -> None:
    recalls = []
    for query in ASKED:
        found = client.search(by_metric[metric], vector=query, k=10)
        scores = brute_force.scores(metric, query, VECTORS)
        assert len(found) == 10
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
        for hit in found:
            assert hit.score == pytest.approx(scores[IDS.index(hit.id)], rel=1e-4, abs=1e-4)
        recalls.append(recall([hit.id for hit in found], brute_force.best(scores, IDS, 10)))
    assert np.mean(recalls) >= 0.98


def test_k_may_be_more_than_there_is(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=4)
    assert len(client.search(name, vector=np.ones(4, np.float32), k=1_000)) == 0
    client.upsert(name, [{"id": str(i), "vector": RNG.normal(size=4).astype(np.float32)} for i in range(7)])
    assert len(client.search(name, vector=np.ones(4, np.float32), k=1_000)) == 7
    # No k at all means ten.
    client.upsert(name, [{"id": f"b{i}", "vector": np.ones(4, np.float32)} for i in range(7)])
    assert len(client.search(name, vector=np.ones(4, np.float32))) == 10


def test_equal_scores_are_in_the_order_of_their_ids(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=4, shards=2)
    ids = [f"same{i:02}" for i in range(20)]
    client.upsert(name, [{"id": id, "vector": np.ones(4, np.float32)} for id in reversed(ids)])
    assert [hit.id for hit in client.search(name, vector=np.ones(4, np.float32), k=20, exact=True)] == ids


def test_a_zero_vector_has_no_direction_and_hurts_nobody(
    client: Client, make_collection: MakeCollection
) -> None:
    name = make_collection(dim=4)
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    client.upsert(name, [{"id": "zero", "vector": zero}, {"id": "one", "vector": one}])
    assert [(hit.id, hit.score) for hit in client.search(name, vector=one)] == [
        ("one", pytest.approx(1.0)),
        ("zero", 0.0),
    ]
    assert {hit.score for hit in client.search(name, vector=zero)} == {0.0}


# -- by id, and what a hit carries


@pytest.mark.parametrize("metric", METRICS)
def test_a_search_by_id_is_one_by_its_vector_without_itself(
    client: Client, by_metric: dict[str, str], metric: str
) -> None:
    for row in (0, 700, ROWS - 1):
        found = client.search(by_metric[metric], id=IDS[row], k=20, exact=True)
        scores = brute_force.scores(metric, VECTORS[row], VECTORS)
        assert [hit.id for hit in found] == brute_force.best(scores, IDS, 20, np.arange(ROWS) != row)


def test_a_hit_carries_the_parts_asked_for(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "some text", "attributes": {"rank": 1}}])

    def ask(*include: str) -> tuple[object, ...]:
        (hit,) = client.search(collection, text="some text", include=include or None)
        return hit.text, dict(hit.attributes), hit.vector is not None

    assert ask() == ("some text", {"rank": 1}, False)
    assert ask("text") == ("some text", {}, False)
    assert ask("attributes") == (None, {"rank": 1}, False)
    assert ask("vector") == (None, {}, True)
    assert ask("text", "attributes", "vector") == ("some text", {"rank": 1}, True)


def test_an_answer_says_where_it_comes_from(rpc: Rpc, collection: str) -> None:
    text = f"a text nobody embedded before, {uuid4().hex}"
    rpc.document.Upsert(
        pb.UpsertRequest(collection=collection, documents=[pb.Document(id="a", text=text)], wait=pb.VISIBLE)
    )
    told = rpc.collection.Get(pb.GetCollectionRequest(name=collection))
    answer = rpc.search.Search(pb.SearchRequest(collection=collection, text=text))
    assert (answer.generation, answer.space, answer.variant, answer.epoch) == (
        told.generation, told.space, told.variant, told.epoch,
    )  # fmt: skip
    assert (answer.coverage.shards_asked, answer.coverage.shards_answered) == (1, 1)
    assert answer.timings.total_ms >= answer.timings.search_ms > 0
    assert answer.timings.inference_ms > 0


# -- batches


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_of_vectors_is_so_many_searches(
    client: Client, by_metric: dict[str, str], exact: bool
) -> None:
    name = by_metric["cosine"]
    batch = client.batch_search(name, vectors=ASKED, k=15, exact=exact)
    assert batch.scores.shape == (QUERIES, 15)
    for i, query in enumerate(ASKED):
        one = client.search(name, vector=query, k=15, exact=exact)
        assert list(batch.ids[i]) == [hit.id for hit in one]
        np.testing.assert_allclose(batch.scores[i], [hit.score for hit in one], atol=1e-6)


def test_a_batch_of_texts_is_so_many_searches(client: Client, collection: str) -> None:
    texts = [f"{word} number {i}" for i in range(8) for word in ("apple", "engine", "river")]
    documents = [{"id": str(i), "text": text, "attributes": {"rank": i % 4}} for i, text in enumerate(texts)]
    client.upsert(collection, documents)
    for options in ({}, {"filter": "rank = 2"}, {"k": 50}):
        batch = client.batch_search(collection, texts=texts, **options)
        for i, text in enumerate(texts):
            one = client.search(collection, text=text, **options)
            assert list(batch.ids[i]) == [hit.id for hit in one]
            np.testing.assert_allclose(batch.scores[i, : len(one)], [hit.score for hit in one], atol=1e-6)


def test_a_row_of_fewer_hits_is_padded(rpc: Rpc, client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(dim=4)
    client.upsert(name, [{"id": "only", "vector": np.ones(4, np.float32)}])
    vectors = np.ones((2, 4), np.float32)
    answer = rpc.search.BatchSearch(
        pb.BatchSearchRequest(collection=name, vectors=pb.Matrix(data=vectors.tobytes(), rows=2, dim=4), k=3)
    )
    assert list(answer.ids) == ["only", "", ""] * 2
    assert list(answer.counts) == [1, 1]
    scores = np.frombuffer(answer.scores.data, "<f4").reshape(2, 3)
    assert np.isneginf(scores[:, 1:]).all()


@pytest.mark.parametrize(("dtype", "scales"), [(pb.F16, False), (pb.I8, True)])
def test_queries_may_come_in_a_smaller_dtype(
    rpc: Rpc, client: Client, by_metric: dict[str, str], dtype: "pb.DType.ValueType", scales: bool
) -> None:
    query = ASKED[0]
    scale = np.float32(np.abs(query).max() / 127)
    data = (np.rint(query / scale).astype(np.int8) if scales else query.astype(np.float16)).tobytes()
    matrix = pb.Matrix(data=data, dtype=dtype, rows=1, dim=DIM, scales=scale.tobytes() if scales else b"")
    request = pb.SearchRequest(collection=by_metric["cosine"], vector=matrix, k=20)
    found = [hit.id for hit in rpc.search.Search(request).hits]
    wanted = [hit.id for hit in client.search(by_metric["cosine"], vector=query, k=20)]
    assert recall(found, wanted) >= 0.9


# -- shards


def test_two_shards_answer_as_one(client: Client, make_collection: MakeCollection) -> None:
    one, two = (make_collection(dim=DIM, shards=shards, attributes={"rank": "int"}) for shards in (1, 2))
    documents = [
        {"id": id, "vector": vector, "attributes": {"rank": i % 50}}
        for i, (id, vector) in enumerate(zip(IDS, VECTORS, strict=True))
    ]
    for name in (one, two):
        client.upsert(name, documents, batch=256)
        client.delete(name, filter="rank = 7")
        client.upsert(name, [{"id": "v0003", "vector": ASKED[0], "attributes": {"rank": 1}}])
    assert client.count(one) == client.count(two) == ROWS - ROWS // 50
    for query in ASKED[:10]:
        for options in ({}, {"filter": "rank < 10"}, {"filter": "rank = 1"}):
            first = client.search(one, vector=query, k=30, exact=True, **options)
            second = client.search(two, vector=query, k=30, exact=True, **options)
            assert [(hit.id, hit.attributes) for hit in first] == [(hit.id, hit.attributes) for hit in second]
            np.testing.assert_allclose([h.score for h in first], [h.score for h in second], atol=1e-6)
            assert (first.coverage.shards_asked, first.coverage.shards_answered) == (1, 1)
            assert (second.coverage.shards_asked, second.coverage.shards_answered) == (2, 2)
    by_id = [client.search(name, id="v0100", k=10, exact=True) for name in (one, two)]
    assert [hit.id for hit in by_id[0]] == [hit.id for hit in by_id[1]]
    liked = [client.recommend(name, like=["v0100", "v0200"], unlike=["v0300"], k=5) for name in (one, two)]
    assert recall([hit.id for hit in liked[0]], [hit.id for hit in liked[1]]) >= 0.8
    assert liked[1].coverage.shards_answered == 2
    assert sorted(d.id for d in client.scan(two)) == sorted(d.id for d in client.scan(one))
