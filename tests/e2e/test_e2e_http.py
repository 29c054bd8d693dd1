"""The HTTP face: the same answers as gRPC's, in the forms other tools expect, and errors as JSON."""

import base64
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from google.protobuf import json_format
from rpc import Rpc
from scrape import Scrape
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client

TEXTS = ["a fast json parser", "a recipe for apple pie", "json schema validation", "naïve café ☃"]


@pytest.fixture
def filled(client: Client, collection: str) -> str:
    client.upsert(
        collection,
        [
            {"id": f"h{i}", "text": text, "attributes": {"rank": i, "tags": ["a", f"t{i}"]}}
            for i, text in enumerate(TEXTS)
        ],
    )
    return collection


def post(web: httpx.Client, path: str, **body: Any) -> Any:
    answer = web.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- embeddings


def test_embeddings_are_those_of_embed(web: httpx.Client, client: Client) -> None:
    wanted = client.embed(TEXTS, input_type="DOCUMENT")
    floats = post(web, "/v1/embeddings", input=TEXTS)
    packed = post(web, "/v1/embeddings", input=TEXTS, encoding_format="base64")
    for answer in (floats, packed):
        assert answer["object"] == "list"
        assert [each["index"] for each in answer["data"]] == [0, 1, 2, 3]
        assert {each["object"] for each in answer["data"]} == {"embedding"}
        assert answer["model"] == "all-minilm-l6-v2@1"
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 4
    np.testing.assert_array_equal(np.array([e["embedding"] for e in floats["data"]], np.float32), wanted)
    raw = b"".join(base64.b64decode(each["embedding"]) for each in packed["data"])
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(wanted.shape), wanted)


def test_one_text_needs_no_list_and_the_model_may_be_named(web: httpx.Client, client: Client) -> None:
    answer = post(web, "/v1/embeddings", input=TEXTS[0], model="all-minilm-l6-v2", encoding_format="float")
    wanted = client.embed(TEXTS[:1], input_type="DOCUMENT")
    np.testing.assert_array_equal(np.array([answer["data"][0]["embedding"]], np.float32), wanted)


# -- rerank


def test_rerank_is_that_of_grpc(web: httpx.Client, client: Client) -> None:
    wanted = client.rerank("parse json", TEXTS)
    answer = post(web, "/v1/rerank", query="parse json", documents=TEXTS, model="similarity")
    assert [result["index"] for result in answer["results"]] == [hit.index for hit in wanted]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == [hit.score for hit in wanted] == sorted(scores, reverse=True)
    top = post(
        web, "/v1/rerank", query="parse json", top_n=2, return_documents=True,
        documents=[{"text": text} for text in TEXTS],
    )  # fmt: skip
    assert [result["document"]["text"] for result in top["results"]] == [TEXTS[h.index] for h in wanted[:2]]


# -- search and recommend


@pytest.mark.parametrize(
    "asked",
    [
        {"text": "json"},
        {"text": "json", "k": 2},
        {"id": "h0"},
        {"text": "json", "filter": "rank >= 1"},
        {"text": "json", "filter": {"compare": {"attribute": "rank", "op": "GE", "value": {"int": 1}}}},
        {"text": "json", "include": {"vector": True}},
        {"text": "json", "exact": True, "cache": "BYPASS"},
    ],
    ids=str,
)
def test_search_is_that_of_grpc(web: httpx.Client, rpc: Rpc, filled: str, asked: dict[str, Any]) -> None:
    told = post(web, "/v1/search", collection=filled, **asked)
    answer = json_format.ParseDict(told, pb.SearchResponse())
    filter = asked.get("filter")
    message = {**asked, **({"filter": {"text": filter}} if isinstance(filter, str) else {})}
    wanted = rpc.search.Search(json_format.ParseDict({"collection": filled, **message}, pb.SearchRequest()))
    assert len(answer.hits) > 0
    for each in (answer, wanted):
        each.ClearField("timings")
        each.ClearField("served_from")
    assert answer == wanted
    # Defaults are printed, and names are the contract's.
    assert told["served_from"] == "INDEX"
    assert told["coverage"] == {"shards_asked": 1, "shards_answered": 1}


def test_a_vector_may_be_searched_for(web: httpx.Client, client: Client, filled: str) -> None:
    vector = client.embed(["json"])
    data = base64.b64encode(vector.tobytes()).decode()
    told = post(web, "/v1/search", collection=filled, vector={"data": data, "rows": 1, "dim": 384})
    assert [hit["id"] for hit in told["hits"]] == [hit.id for hit in client.search(filled, vector=vector[0])]


def test_the_caches_are_one(web: httpx.Client, client: Client, filled: str, scrape: Scrape) -> None:
    def served(text: str) -> str:
        assert client.search(filled, text=text).served_from == "INDEX"
        told: str = post(web, "/v1/search", collection=filled, text=text)["served_from"]
        return told

    if len(scrape.gateways) == 1:
        assert served("json") == "L1"
    else:  # another gateway finds it in Redis, once it has got there
        texts = (f"json {i}" for i in range(100))
        eventually(lambda: served(next(texts)) in ("L1", "REDIS"))


def test_recommend_is_that_of_grpc(web: httpx.Client, rpc: Rpc, filled: str) -> None:
    asked = {
        "collection": filled,
        "like": [{"id": "h0"}, {"text": "json"}],
        "unlike": [{"id": "h1"}],
        "rank": {"features": {"rank": 0.1}},
        "diversity": {"mmr_lambda": 0.7},
        "k": 2,
    }
    told = post(web, "/v1/recommend", **asked, retrieve={"filter": "rank >= 1"})
    answer = json_format.ParseDict(told, pb.RecommendResponse())
    wanted = rpc.search.Recommend(
        json_format.ParseDict({**asked, "retrieve": {"filter": {"text": "rank >= 1"}}}, pb.RecommendRequest())
    )
    assert answer.hits == wanted.hits
    assert [hit.id for hit in answer.hits] == ["h2", "h3"]
    assert [stage.name for stage in answer.stages] == ["retrieve", "rank", "diversify"]


# -- errors


ERRORS: list[tuple[str, Any, int, str, str]] = [
    ("search", {"collection": "no-such", "text": "x"}, 404, "NOT_FOUND", "collection"),
    ("search", {"collection": "COLLECTION", "text": "x", "k": 0}, 400, "INVALID_ARGUMENT", "k"),
    ("search", {"collection": "COLLECTION", "text": "x", "k": "many"}, 400, "INVALID_ARGUMENT", "body"),
    ("search", {"collection": "COLLECTION", "text": "x", "kk": 1}, 400, "INVALID_ARGUMENT", "body"),
    (
        "search",
        {"collection": "COLLECTION", "text": "x", "filter": "rank <"},
        400,
        "INVALID_ARGUMENT",
        "filter",
    ),
    ("search", {"collection": "COLLECTION", "text": "x", "mode": "LEXICAL"}, 501, "UNIMPLEMENTED", "mode"),
    (
        "search",
        {"collection": "COLLECTION", "text": "x", "read_after": {"positions": {"other": 1}}},
        400,
        "FAILED_PRECONDITION",
        "read_after",
    ),
    ("recommend", {"collection": "COLLECTION", "like": []}, 400, "INVALID_ARGUMENT", "like"),
    ("recommend", {"collection": "COLLECTION", "like": [{"id": "x"}]}, 404, "NOT_FOUND", "like[0].id"),
    ("embeddings", {}, 400, "INVALID_ARGUMENT", "input"),
    ("embeddings", {"input": []}, 400, "INVALID_ARGUMENT", "input"),
    ("embeddings", {"input": [[1, 2]]}, 400, "INVALID_ARGUMENT", "input"),
    ("embeddings", {"input": ["x", "x" * 40_000]}, 400, "INVALID_ARGUMENT", "input[1]"),
    ("embeddings", {"input": "x", "model": "no-such"}, 404, "NOT_FOUND", "model"),
    ("embeddings", {"input": "x", "encoding_format": "csv"}, 400, "INVALID_ARGUMENT", "encoding_format"),
    ("rerank", {"query": "x"}, 400, "INVALID_ARGUMENT", "documents"),
    ("rerank", {"query": "x", "documents": []}, 400, "INVALID_ARGUMENT", "documents"),
    ("rerank", {"query": "", "documents": ["x"]}, 400, "INVALID_ARGUMENT", "query"),
    ("rerank", {"query": "x", "documents": ["x"], "model": "no-such"}, 404, "NOT_FOUND", "model"),
    ("rerank", {"query": "x", "documents": ["x"], "ranker": "no-such"}, 404, "NOT_FOUND", "ranker"),
    ("rerank", {"query": "x", "documents": ["x"], "model": 5}, 400, "INVALID_ARGUMENT", "body"),
    ("search", b"not json", 400, "INVALID_ARGUMENT", "body"),
    ("search", b"[]", 400, "INVALID_ARGUMENT", "body"),
    ("search", b"[" * 100_000, 400, "INVALID_ARGUMENT", "body"),
    ("search", b'{"text": "\\ud800"}', 400, "INVALID_ARGUMENT", "body"),
    ("search", b'{"text": "\xff"}', 400, "INVALID_ARGUMENT", "body"),
    ("search", b" " * (17 * 1024 * 1024), 413, "INVALID_ARGUMENT", "body"),
    ("nothing", {}, 404, "NOT_FOUND", ""),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "field"), ERRORS, ids=range(len(ERRORS)))
def test_an_error_is_json_of_the_right_status(
    web: httpx.Client, collection: str, path: str, body: Any, status: int, code: str, field: str
) -> None:
    if isinstance(body, dict) and body.get("collection") == "COLLECTION":
        body = {**body, "collection": collection}
    answer = web.post(f"/v1/{path}", **({"content": body} if isinstance(body, bytes) else {"json": body}))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == (code, field)
    assert error["message"]
    assert error["reason"]


def test_another_method_is_refused(web: httpx.Client) -> None:
    answer = web.get("/v1/search")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "UNIMPLEMENTED"
    assert "POST" in answer.headers["allow"]


# -- for operators


def test_metrics_count_calls_by_method_and_code(
    web: httpx.Client, client: Client, filled: str, scrape: Scrape
) -> None:
    counters = {
        "searches": {"method": "Search", "code": "OK"},
        "refusals": {"method": "Search", "code": "NOT_FOUND"},
        "over HTTP": {"method": "http_search", "code": "OK"},
        "refused over HTTP": {"method": "http_search", "code": "NOT_FOUND"},
    }
    before = {what: scrape.value("ringfort_rpc_total", **labels) for what, labels in counters.items()}
    for _ in range(3):
        client.search(filled, text="json")
    post(web, "/v1/search", collection=filled, text="json")
    web.post("/v1/search", json={"collection": "no-such", "text": "x"})
    with pytest.raises(Exception, match="no collection named"):
        client.search(f"no-{uuid4().hex}", text="json")
    made = {"searches": 3, "refusals": 1, "over HTTP": 1, "refused over HTTP": 1}

    def counted() -> dict[str, float]:
        after = {what: scrape.value("ringfort_rpc_total", **labels) for what, labels in counters.items()}
        return {what: after[what] - before[what] for what in counters}

    # A caller may hear of its refusal before the call is counted.
    eventually(lambda: counted()["refusals"])
    assert counted() == made
    assert scrape.value("ringfort_rpc_seconds_count", method="Search") >= 4


def test_every_part_has_metrics(web: httpx.Client, scrape: Scrape) -> None:
    answer = web.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {name.split("{")[0] for name in scrape.samples()}
    for part in ("gateway", "answers", "cache", "embedder", "metadata", "shard", "supervisor"):
        assert any(name.startswith(f"ringfort_{part}_") for name in names), part


def test_probes_say_ok(web: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        answer = web.get(path)
        assert (answer.status_code, answer.text) == (200, "ok\n")
