"""Requests say what was asked, answers become values, and both clients are one."""

import inspect
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from client_fakes import PACKAGES, FakeService, search_answer
from google.protobuf import descriptor_pool

import ringfort
from protos.ringfort import v1 as pb
from ringfort import (
    ABSENT,
    AsyncClient,
    Client,
    Document,
    InvalidArgument,
    Patch,
    Version,
    WriteToken,
)
from ringfort.calls import collections, documents, embedding, operations, search
from ringfort.calls.call import Call
from ringfort.channel import REPEATABLE

CALLS: list[Call[Any, Any]] = [
    collections.create_collection("c"),
    collections.collection("c"),
    collections.collections(),
    collections.delete_collection("c"),
    collections.set_alias("a", None),
    documents.patch("c", []),
    documents.delete("c", ids=["a"]),
    documents.get("c", ["a"]),
    documents.scan_page("c"),
    documents.count("c"),
    search.search("c", text="t"),
    search.batch_search("c", texts=["t"]),
    search.recommend("c"),
    embedding.embed(["t"]),
    embedding.rerank("q", ["t"]),
    operations.reindex("c"),
    operations.job("j"),
    operations.activate("c", 2),
    operations.rollback("c"),
    operations.models(),
    operations.register_model("/models/m"),
    operations.set_traffic("m", "1", 10),
    operations.promote_model("m", "1"),
    operations.rollback_model("m"),
    operations.cluster(),
    operations.cache_stats(),
    operations.hot_keys(),
    operations.warm_cache("c"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.method)
def test_a_call_fits_its_method_in_the_contract(call: Call[Any, Any]) -> None:
    service, _, name = call.method.partition("/")
    method = descriptor_pool.Default().FindServiceByName(f"ringfort.v1.{service}").methods_by_name[name]
    assert call.request.DESCRIPTOR is method.input_type
    assert call.answer.DESCRIPTOR is method.output_type
    assert call.path == f"/{method.containing_service.full_name}/{name}"
    assert call.repeatable is (call.method in REPEATABLE)
    assert call.read(call.answer()) is not call


def test_methods_that_may_be_repeated_exist() -> None:
    for name in REPEATABLE:
        service, _, method = name.partition("/")
        descriptor = descriptor_pool.Default().FindServiceByName(f"ringfort.v1.{service}")
        assert method in descriptor.methods_by_name


def _public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    blocking, awaited = _public(Client), _public(AsyncClient)
    assert blocking.keys() == awaited.keys()
    for name in blocking:
        assert list(inspect.signature(blocking[name]).parameters) == list(
            inspect.signature(awaited[name]).parameters
        )
    shown = inspect.signature(Client.search)
    assert list(shown.parameters)[:3] == ["self", "collection", "text"]
    assert shown.return_annotation is ringfort.SearchResult


def test_every_public_name_loads() -> None:
    for name in ringfort.__all__:
        assert getattr(ringfort, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ringfort.nonsense


def test_search_says_everything_that_was_asked(fake: FakeService, client: Any) -> None:
    fake.answers["SearchService/Search"] = lambda request, context: search_answer("ray", "faiss")
    result = client.search(
        "packages",
        text="vectors",
        k=3,
        filter="rank < 5",
        mode="hybrid",
        effort=0.5,
        exact=True,
        include=["text"],
        read_after=WriteToken({"log": 7}),
        min_coverage=1.0,
        max_staleness_ms=0,
        cache=False,
    )
    assert fake.requests == [
        pb.SearchRequest(
            collection="packages",
            text="vectors",
            mode=pb.HYBRID,
            k=3,
            filter=pb.Filter(text="rank < 5"),
            effort=0.5,
            exact=True,
            include=pb.Include(text=True),
            read_after=pb.WriteToken(positions={"log": 7}),
            min_coverage=1.0,
            max_staleness_ms=0,
            cache=pb.BYPASS,
        )
    ]
    assert fake.requests[0].HasField("max_staleness_ms")
    assert [hit.id for hit in result] == ["ray", "faiss"]
    assert len(result) == 2
    assert result[1].score == 0.875
    assert result[1].attributes == {"rank": 1, "name": "faiss"}
    assert result[1].version == Version(1, 2)
    assert result.served_from == "INDEX"
    assert result.coverage.complete
    assert (result.generation, result.space, result.variant, result.epoch) == (1, "s1", "v1", 3)
    assert (result.timings.total_ms, result.timings.rank_ms) == (3.25, 0)


def test_what_was_not_asked_is_left_to_the_service() -> None:
    request = search.search("c", id="ray").request
    assert isinstance(request, pb.SearchRequest)
    assert request == pb.SearchRequest(collection="c", id="ray", k=10)
    assert not request.HasField("include")
    assert not request.HasField("max_staleness_ms")
    assert not request.HasField("effort")
    assert not request.HasField("recall")


def test_a_recall_to_reach_is_asked_for_in_every_kind_of_search() -> None:
    one = search.search("c", id="ray", recall=0.75).request
    many = search.batch_search("c", texts=["t"], recall=0.75).request
    staged = search.recommend("c", like=["ray"], recall=0.75).request
    assert isinstance(one, pb.SearchRequest)
    assert isinstance(many, pb.BatchSearchRequest)
    assert isinstance(staged, pb.RecommendRequest)
    assert (one.recall, many.recall, staged.retrieve.recall) == (0.75, 0.75, 0.75)


def test_an_empty_include_asks_for_ids_alone() -> None:
    request = search.search("c", text="t", include=()).request
    assert isinstance(request, pb.SearchRequest)
    assert request.HasField("include")
    assert request.include == pb.Include()


def test_vectors_travel_packed_and_little_endian() -> None:
    vector = np.array([1, -2, 3], dtype=np.float64)
    request = search.search("c", vector=vector).request
    assert isinstance(request, pb.SearchRequest)
    assert request.vector == pb.Matrix(data=np.array([1, -2, 3], "<f4").tobytes(), rows=1, dim=3)


@pytest.mark.parametrize(
    ("dtype", "name"), [("<f4", pb.F32), ("<f2", pb.F16), ("i1", pb.I8)], ids=["f32", "f16", "i8"]
)
def test_embeddings_come_back_as_float32_whatever_they_travelled_as(
    fake: FakeService, client: Any, dtype: str, name: Any
) -> None:
    packed = np.array([[1, 2], [-3, 4]]).astype(dtype)
    scales = np.array([0.5, 2], "<f4").tobytes() if name == pb.I8 else b""
    matrix = pb.Matrix(data=packed.tobytes(), dtype=name, rows=2, dim=2, scales=scales)
    fake.answers["EmbeddingService/Embed"] = lambda request, context: pb.EmbedResponse(vectors=matrix)
    vectors = client.embed(["a", "b"], input_type="DOCUMENT")
    want = [[0.5, 1], [-6, 8]] if name == pb.I8 else [[1, 2], [-3, 4]]
    assert vectors.dtype == np.float32
    assert vectors.tolist() == want
    assert fake.requests[0].input_type == pb.DOCUMENT


def test_batch_search_gives_each_query_its_own_hits(fake: FakeService, client: Any) -> None:
    scores = np.array([[0.9, 0.8], [0.7, -np.inf]], "<f4")
    fake.answers["SearchService/BatchSearch"] = lambda request, context: pb.BatchSearchResponse(
        ids=["a", "b", "c", ""],
        scores=pb.Matrix(data=scores.tobytes(), rows=2, dim=2),
        counts=[2, 1],
        row_served_from=[pb.L1, pb.INDEX],
    )
    result = client.batch_search("c", vectors=np.eye(2, dtype=np.float32), k=2)
    assert result.ids == (("a", "b"), ("c",))
    assert np.array_equal(result.scores, scores)
    assert result.row_served_from == ("L1", "INDEX")
    assert len(result) == 2


def test_recommend_takes_examples_of_every_kind(fake: FakeService, client: Any) -> None:
    fake.answers["SearchService/Recommend"] = lambda request, context: pb.RecommendResponse(
        hits=[pb.Hit(id="httpx", score=1, features={"similarity": 0.5})],
        stages=[
            pb.Stage(name="retrieve", took_ms=2, candidates=100),
            pb.Stage(name="rank", skipped="no time"),
        ],
        ranker="blend@1",
    )
    result = client.recommend(
        "c",
        like=["requests", {"text": "http"}, np.ones(2, np.float32)],
        unlike=["boto3"],
        exclude=["urllib3"],
        k=5,
        candidates=200,
        filter="rank < 9",
        rank={"similarity": 1, "rank": -0.5},
        mmr_lambda=0.7,
        group_by="name",
        per_group=2,
        user_features={"age": 3},
    )
    one = pb.Matrix(data=np.ones(2, "<f4").tobytes(), rows=1, dim=2)
    assert fake.requests == [
        pb.RecommendRequest(
            collection="c",
            like=[pb.Example(id="requests"), pb.Example(text="http"), pb.Example(vector=one)],
            unlike=[pb.Example(id="boto3")],
            exclude=["urllib3"],
            k=5,
            retrieve=pb.RecommendRequest.Retrieve(k=200, filter=pb.Filter(text="rank < 9")),
            rank=pb.RecommendRequest.Rank(features={"similarity": 1, "rank": -0.5}),
            diversity=pb.RecommendRequest.Diversity(mmr_lambda=np.float32(0.7), group_by="name", per_group=2),
            user_features={"age": pb.Value(int=3)},
        )
    ]
    assert result[0].features == {"similarity": 0.5}
    assert result.ranker == "blend@1"
    assert [(stage.name, stage.candidates, stage.skipped) for stage in result.stages] == [
        ("retrieve", 100, ""),
        ("rank", 0, "no time"),
    ]


def test_attributes_keep_their_types_there_and_back() -> None:
    attributes = {
        "keyword": "x",
        "int": 2**62,
        "float": 0.1,
        "bool": True,
        "timestamp": datetime(2026, 11, 1, 12, 30, 0, 123456, tzinfo=UTC),
        "keywords": ("a", "b"),
    }
    from ringfort import wire

    messages = wire.to_values({**attributes, "null": None, "numpy": np.int64(3)})
    assert {name: message.WhichOneof("kind") for name, message in messages.items()} == {
        **{name: name for name in attributes},
        "numpy": "int",
    }
    assert wire.from_values(messages) == {**attributes, "numpy": 3}


def test_create_collection_names_types_and_leaves_defaults(fake: FakeService, client: Any) -> None:
    fake.answers["CollectionService/Create"] = lambda request, context: PACKAGES
    made = client.create_collection("packages", attributes={"rank": "int", "name": "keyword"}, shards=2)
    assert fake.requests == [
        pb.CreateCollectionRequest(
            name="packages",
            attributes={"rank": pb.INT, "name": pb.KEYWORD},
            shards=2,
            index=pb.IndexSpec(),
        )
    ]
    assert made.attributes == {"name": "keyword", "rank": "int"}
    assert (made.metric, made.index, made.aliases) == ("cosine", "auto", ("pypi",))


def test_get_keeps_the_order_asked_and_leaves_gaps(fake: FakeService, client: Any) -> None:
    found = pb.Document(id="b", text="B", version=pb.Version(term=1, seq=5))
    fake.answers["DocumentService/Get"] = lambda request, context: pb.GetResponse(
        documents=[found], missing=["a"]
    )
    assert client.get("c", ["a", "b", "b"]) == [
        None,
        Document("b", "B", version=Version(1, 5)),
        Document("b", "B", version=Version(1, 5)),
    ]


def test_scan_follows_the_pages(fake: FakeService, client: Any) -> None:
    pages = {"": (["a", "b"], "next"), "next": ([], "last"), "last": (["c"], "")}

    def scan(request: pb.ScanRequest, context: Any) -> pb.ScanResponse:
        ids, token = pages[request.page_token]
        return pb.ScanResponse(documents=[pb.Document(id=id) for id in ids], next_page_token=token)

    fake.answers["DocumentService/Scan"] = scan
    assert [document.id for document in client.scan("c", filter="rank = 1")] == ["a", "b", "c"]
    assert [request.filter.text for request in fake.requests] == ["rank = 1"] * 3


def test_patch_clears_what_is_null(fake: FakeService, client: Any) -> None:
    fake.answers["DocumentService/Patch"] = lambda request, context: pb.PatchResponse(
        statuses=[pb.WriteStatus(id="a"), pb.WriteStatus(id="b", code=5, message="no b", field="id")]
    )
    result = client.patch(
        "c", [Patch("a", {"rank": 1, "name": None}), {"id": "b", "attributes": {}}], wait="DURABLE"
    )
    assert fake.requests[0].patches[0] == pb.Patch(
        id="a", attributes={"rank": pb.Value(int=1)}, clear=["name"]
    )
    assert result.written == 1
    assert [(f.id, f.code.name, f.message, f.field) for f in result.failures] == [
        ("b", "NOT_FOUND", "no b", "id")
    ]


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: search.search("c"), "query"),
        (lambda: search.search("c", text="t", id="i"), "query"),
        (lambda: search.search("c", text="t", mode="fuzzy"), "mode"),
        (lambda: search.search("c", text="t", k=0), "k"),
        (lambda: search.search("c", text="t", include=["vectors"]), "include"),
        (lambda: search.search("c", vector=[1.0, 2.0]), "vector"),  # type: ignore[arg-type]
        (lambda: search.batch_search("c", vectors=np.zeros(3, np.float32)), "vectors"),
        (lambda: search.batch_search("c"), "queries"),
        (lambda: search.recommend("c", like="requests"), "like"),
        (lambda: documents.delete("c"), "ids"),
        (lambda: documents.get("c", "abc"), "ids"),
        (lambda: embedding.embed("abc"), "texts"),
        (lambda: collections.create_collection("c", attributes={"a": "money"}), "attributes.a"),
        (lambda: collections.create_collection("c", metric="manhattan"), "metric"),
        (lambda: documents.patch("c", [Patch("a", {"x": object()})]), "attributes.x"),  # type: ignore[dict-item]
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(build: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        build()
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"text": "x"}, "needs an id"),
        ({"id": "a", "titel": "x"}, "unknown key 'titel'"),
        ({"id": "a", "vector": [1.0]}, "numpy array"),
        ({"id": "a", "attributes": {"n": 2**70}}, "attributes.n"),
        ({"id": 5}, "document 5"),
    ],
)
def test_a_document_that_cannot_be_said_is_named(document: Any, says: str) -> None:
    batcher = documents.Batcher("c", "VISIBLE", 10, False)
    with pytest.raises(InvalidArgument, match=says):
        batcher.add(document)


def _requests(batch: int, *given: Any) -> list[pb.UpsertRequest]:
    return list(documents.upsert_requests(given, documents.Batcher("c", "DURABLE", batch, True)))


def test_documents_are_cut_into_batches() -> None:
    requests = _requests(2, *({"id": str(i), "text": "t"} for i in range(5)))
    assert [[document.id for document in request.documents] for request in requests] == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
    ]
    assert {(request.collection, request.wait, request.truncate) for request in requests} == {
        ("c", pb.DURABLE, True)
    }


def test_a_batch_is_also_bounded_by_its_bytes() -> None:
    text = "x" * (documents.MAX_BATCH_BYTES // 3)
    requests = _requests(100, *({"id": str(i), "text": text} for i in range(5)))
    assert [len(request.documents) for request in requests] == [2, 2, 1]


def test_vectors_of_a_whole_batch_are_one_matrix() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    (request,) = _requests(2, Document("a", vector=vectors[0]), {"id": "b", "vector": vectors[1]})
    assert request.vectors == pb.Matrix(data=vectors.tobytes(), rows=2, dim=3)
    assert not any(document.HasField("vector") for document in request.documents)


def test_a_batch_with_some_vectors_gives_each_to_its_document() -> None:
    (request,) = _requests(2, Document("a", "text"), Document("b", vector=np.ones(2, np.float32)))
    assert not request.HasField("vectors")
    assert [document.HasField("vector") for document in request.documents] == [False, True]


def test_absent_is_said_as_version_zero() -> None:
    (request,) = _requests(1, Document("a", "t", if_version=ABSENT))
    assert request.documents[0].HasField("if_version")
    assert request.documents[0].if_version == pb.Version()


def test_tokens_join_at_the_later_position() -> None:
    joined = WriteToken({"a": 3, "b": 9}) | WriteToken({"a": 5, "c": 1}) | WriteToken({"b": 2})
    assert joined.positions == {"a": 5, "b": 9, "c": 1}
