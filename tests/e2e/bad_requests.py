"""Requests that have to be refused, by what is wrong with them."""

from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from protos.ringfort import v1 as pb

#: A collection of the default model, and one of bare vectors of dimension 4; three documents in each.
TEXTS, VECTORS = "bad-input-texts", "bad-input-vectors"

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
ALREADY_EXISTS = grpc.StatusCode.ALREADY_EXISTS


def matrix(*rows: list[float]) -> pb.Matrix:
    array = np.array(rows, np.float32)
    return pb.Matrix(data=array.tobytes(), rows=array.shape[0], dim=array.shape[1])


ONE = matrix([1, 0, 0, 0])
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """A request, and how it has to be refused."""

    call: str
    request: Any
    code: grpc.StatusCode
    field: str


def upsert(document: pb.Document, field: str, collection: str = VECTORS) -> Bad:
    request = pb.UpsertRequest(collection=collection, documents=[document], wait=pb.VISIBLE)
    return Bad("document.Upsert", request, INVALID, f"documents[0].{field}")


def attribute(name: str, value: pb.Value, field: str = "") -> Bad:
    document = pb.Document(id="bad", vector=ONE, attributes={name: value})
    return upsert(document, f"attributes{field or '.' + name}")


def search(code: grpc.StatusCode, field: str, **given: Any) -> Bad:
    request = pb.SearchRequest(
        **{"collection": VECTORS, **({} if _query(given) else {"vector": ONE}), **given}
    )
    return Bad("search.Search", request, code, field)


def _query(given: dict[str, Any]) -> set[str]:
    return {"vector", "text", "id"} & given.keys()


def filtered(filter: pb.Filter | str, field: str = "filter") -> Bad:
    message = pb.Filter(text=filter) if isinstance(filter, str) else filter
    return Bad(
        "search.Search", pb.SearchRequest(collection=VECTORS, vector=ONE, filter=message), INVALID, field
    )


def batch(code: grpc.StatusCode, field: str, **given: Any) -> Bad:
    return Bad("search.BatchSearch", pb.BatchSearchRequest(**{"collection": VECTORS, **given}), code, field)


def recommend(code: grpc.StatusCode, field: str, **given: Any) -> Bad:
    like = {} if "like" in given else {"like": [pb.Example(id="a")]}
    return Bad("search.Recommend", pb.RecommendRequest(collection=VECTORS, **like, **given), code, field)


def embed(code: grpc.StatusCode, field: str, **given: Any) -> Bad:
    return Bad("embedding.Embed", pb.EmbedRequest(**{"texts": ["text"], **given}), code, field)


def create(code: grpc.StatusCode, field: str, **given: Any) -> Bad:
    request = pb.CreateCollectionRequest(**{"name": "bad-input-never", "dim": 4, **given})
    return Bad("collection.Create", request, code, field)


def nested(depth: int) -> pb.Filter:
    filter = pb.Filter(exists=pb.Exists(attribute="rank"))
    for _ in range(depth):
        outer = pb.Filter()
        getattr(outer, "not").CopyFrom(filter)
        filter = outer
    return filter


Rank, Diversity, Retrieve = (
    pb.RecommendRequest.Rank, pb.RecommendRequest.Diversity, pb.RecommendRequest.Retrieve,
)  # fmt: skip
NUMBER, WORD = pb.Value(int=1), pb.Value(keyword="word")

BAD: dict[str, Bad] = {
    # -- documents
    "wrong dimension": upsert(pb.Document(id="bad", vector=matrix([1, 2, 3])), "vector"),
    "beyond what float32 can compare": upsert(
        pb.Document(id="bad", vector=matrix([3e38, 3e38, 0, 0])), "vector"
    ),
    "NaN": upsert(pb.Document(id="bad", vector=matrix([1, NAN, 3, 4])), "vector"),
    "infinity": upsert(pb.Document(id="bad", vector=matrix([1, INF, 3, 4])), "vector"),
    "F16 infinity": upsert(
        pb.Document(
            id="bad",
            vector=pb.Matrix(data=np.full(4, INF, np.float16).tobytes(), dtype=pb.F16, rows=1, dim=4),
        ),
        "vector",
    ),
    "I8 with a NaN scale": upsert(
        pb.Document(
            id="bad",
            vector=pb.Matrix(
                data=b"\1\2\3\4", dtype=pb.I8, rows=1, dim=4, scales=np.float32(NAN).tobytes()
            ),
        ),
        "vector",
    ),
    "I8 without scales": upsert(
        pb.Document(id="bad", vector=pb.Matrix(data=b"\1\2\3\4", dtype=pb.I8, rows=1, dim=4)), "vector.scales"
    ),
    "two rows for one document": upsert(
        pb.Document(id="bad", vector=matrix([1, 2, 3, 4], [1, 2, 3, 4])), "vector.rows"
    ),
    "fewer bytes than rows": upsert(
        pb.Document(id="bad", vector=pb.Matrix(data=b"12345", rows=1, dim=4)), "vector.data"
    ),
    "unknown dtype": upsert(
        pb.Document(id="bad", vector=pb.Matrix(data=b"1" * 16, dtype=9, rows=1, dim=4)), "vector.dtype"
    ),
    "no vector": upsert(pb.Document(id="bad", text="text"), "vector"),
    "neither text nor vector": upsert(pb.Document(id="bad"), "text", TEXTS),
    "empty text": upsert(pb.Document(id="bad", text=""), "text", TEXTS),
    "text over the limit": upsert(pb.Document(id="bad", text="x" * 32_769), "text", TEXTS),
    "text with NUL": upsert(pb.Document(id="bad", text="a\0b"), "text", TEXTS),
    "empty id": upsert(pb.Document(id="", vector=ONE), "id"),
    "id of 257 bytes": upsert(pb.Document(id="x" * 257, vector=ONE), "id"),
    "id of 257 bytes in 129 characters": upsert(pb.Document(id="é" * 128 + "x", vector=ONE), "id"),
    "id with NUL": upsert(pb.Document(id="a\0b", vector=ONE), "id"),
    "undeclared attribute": attribute("colour", WORD),
    "undeclared attribute of a very long name": attribute("x" * 100_000, WORD, "…"),
    "attribute of another type": attribute("rank", WORD),
    "float for an int": attribute("rank", pb.Value(float=1.0)),
    "NaN attribute": attribute("share", pb.Value(float=NAN)),
    "keyword with NUL": attribute("name", pb.Value(keyword="a\0b")),
    "keywords with NUL": attribute("tags", pb.Value(keywords=pb.KeywordList(values=["a", "b\0"]))),
    "timestamp before the year 1": attribute(
        "released", pb.Value(timestamp=Timestamp(seconds=-62_135_596_801))
    ),
    "timestamp after the year 9999": attribute(
        "released", pb.Value(timestamp=Timestamp(seconds=253_402_300_800))
    ),
    "timestamp beyond any number": attribute("released", pb.Value(timestamp=Timestamp(seconds=2**62))),
    "timestamp of negative nanoseconds": attribute(
        "released", pb.Value(timestamp=Timestamp(seconds=1, nanos=-1))
    ),
    "oversized attributes": upsert(
        pb.Document(id="bad", vector=ONE, attributes={"name": pb.Value(keyword="x" * 17_000)}), "attributes"
    ),
    "no documents": Bad("document.Upsert", pb.UpsertRequest(collection=VECTORS), INVALID, "documents"),
    "too many documents": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection=VECTORS, documents=[pb.Document(id=f"bad{i}") for i in range(2_049)]),
        INVALID,
        "documents",
    ),
    "fewer vectors than documents": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection=VECTORS, documents=[pb.Document(id=id) for id in "xy"], vectors=ONE),
        INVALID,
        "vectors.rows",
    ),
    "a vector of its own and a packed one": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection=VECTORS, documents=[pb.Document(id="bad", vector=ONE)], vectors=ONE),
        INVALID,
        "documents[0].vector",
    ),
    "packed NaN": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection=VECTORS, documents=[pb.Document(id="bad")], vectors=matrix([NAN] * 4)),
        INVALID,
        "documents[0].vector",
    ),
    "upsert to nowhere": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection="no-such", documents=[pb.Document(id="bad", vector=ONE)]),
        NOT_FOUND,
        "collection",
    ),
    "unknown wait": Bad(
        "document.Upsert",
        pb.UpsertRequest(collection=VECTORS, documents=[pb.Document(id="bad", vector=ONE)], wait=7),
        INVALID,
        "wait",
    ),
    "patch of an undeclared attribute": Bad(
        "document.Patch",
        pb.PatchRequest(collection=VECTORS, patches=[pb.Patch(id="a", attributes={"colour": WORD})]),
        INVALID,
        "patches[0].attributes.colour",
    ),
    "clearing an undeclared attribute": Bad(
        "document.Patch",
        pb.PatchRequest(collection=VECTORS, patches=[pb.Patch(id="a", clear=["colour"])]),
        INVALID,
        "patches[0].clear[0]",
    ),
    "no patches": Bad("document.Patch", pb.PatchRequest(collection=VECTORS), INVALID, "patches"),
    "delete of nothing": Bad("document.Delete", pb.DeleteRequest(collection=VECTORS), INVALID, "ids"),
    "delete by ids and filter": Bad(
        "document.Delete",
        pb.DeleteRequest(collection=VECTORS, ids=["a"], filter=pb.Filter(text="rank = 1")),
        INVALID,
        "ids",
    ),
    "delete by an empty filter": Bad(
        "document.Delete", pb.DeleteRequest(collection=VECTORS, filter=pb.Filter()), INVALID, "filter"
    ),
    "delete by an unknown attribute": Bad(
        "document.Delete",
        pb.DeleteRequest(collection=VECTORS, filter=pb.Filter(text="colour = 1")),
        INVALID,
        "filter",
    ),
    "delete of an empty id": Bad(
        "document.Delete", pb.DeleteRequest(collection=VECTORS, ids=["a", ""]), INVALID, "ids[1]"
    ),
    "get of nothing": Bad("document.Get", pb.GetRequest(collection=VECTORS), INVALID, "ids"),
    "get of too many": Bad(
        "document.Get", pb.GetRequest(collection=VECTORS, ids=["a"] * 2_049), INVALID, "ids"
    ),
    "a page token that is none": Bad(
        "document.Scan", pb.ScanRequest(collection=VECTORS, page_token="not a token"), INVALID, "page_token"
    ),
    "a page token with NUL in its id": Bad(
        "document.Scan", pb.ScanRequest(collection=VECTORS, page_token="kgOjYQBi"), INVALID, "page_token"
    ),
    "a page of too many": Bad(
        "document.Scan", pb.ScanRequest(collection=VECTORS, page_size=2_049), INVALID, "page_size"
    ),
    "count of nowhere": Bad("document.Count", pb.CountRequest(collection="no-such"), NOT_FOUND, "collection"),
    # -- filters
    "garbage filter": filtered("rank <>>< )("),
    "empty filter text": filtered(""),
    "half a filter": filtered("rank < 5 and"),
    "unknown attribute in a filter": filtered("colour = 1"),
    "wrong type in a filter": filtered('rank = "high"'),
    "order on a flag": filtered("free < true"),
    "a number too large": filtered("rank < 99999999999999999999"),
    "a filter of 17 KB": filtered("rank = 1 or " * 1_500 + "rank = 1"),
    "parentheses without end": filtered("(" * 5_000),
    "nested too deep": filtered(nested(80), "filter" + ".not" * 3),
    "an unknown operator": filtered(
        pb.Filter(compare=pb.Compare(attribute="rank", op=77, value=NUMBER)), "filter.compare.op"
    ),
    "a comparison with nothing": filtered(
        pb.Filter(compare=pb.Compare(attribute="rank")), "filter.compare.value"
    ),
    "a range without bounds": filtered(pb.Filter(range=pb.Range(attribute="rank")), "filter.range"),
    "an unknown attribute in a message": filtered(pb.Filter(exists=pb.Exists(attribute="colour"))),
    "an empty conjunction": filtered(pb.Filter(all=pb.FilterList()), "filter.all.filters"),
    # -- searches
    "k of 0": search(INVALID, "k", k=0),
    "k of 100,000": search(INVALID, "k", k=100_000),
    "effort over 1": search(INVALID, "effort", effort=1.5),
    "effort below 0": search(INVALID, "effort", effort=-0.1),
    "effort NaN": search(INVALID, "effort", effort=NAN),
    "recall over 1": search(INVALID, "recall", recall=1.01),
    "recall below 0": search(INVALID, "recall", recall=-0.1),
    "recall NaN": search(INVALID, "recall", recall=NAN),
    "recall beside effort": search(INVALID, "recall", recall=0.9, effort=0.5),
    "recall of a batch over 1": batch(INVALID, "recall", vectors=matrix([1, 0, 0, 0]), recall=2.0),
    "recall of candidates over 1": recommend(
        INVALID, "retrieve.recall", retrieve=pb.RecommendRequest.Retrieve(recall=1.5)
    ),
    "coverage over 1": search(INVALID, "min_coverage", min_coverage=1.5),
    "coverage NaN": search(INVALID, "min_coverage", min_coverage=NAN),
    "unknown cache control": search(INVALID, "cache", cache=7),
    "LEXICAL": search(UNIMPLEMENTED, "mode", mode=pb.LEXICAL),
    "HYBRID": search(UNIMPLEMENTED, "mode", mode=pb.HYBRID),
    "unknown mode": search(INVALID, "mode", mode=9),
    "unknown collection": search(NOT_FOUND, "collection", collection="no-such"),
    "a very long collection": search(NOT_FOUND, "collection", collection="x" * 1_000_000),
    "query of a wrong dimension": search(INVALID, "vector", vector=matrix([1, 2, 3])),
    "NaN query": search(INVALID, "vector", vector=matrix([NAN, 0, 0, 0])),
    "infinite query": search(INVALID, "vector", vector=matrix([-INF, 0, 0, 0])),
    "two queries": search(INVALID, "vector.rows", vector=matrix([1, 0, 0, 0], [0, 1, 0, 0])),
    "unknown id": search(NOT_FOUND, "id", id="nobody"),
    "empty query id": search(INVALID, "id", id=""),
    "empty query text": search(INVALID, "text", collection=TEXTS, text=""),
    "query text over the limit": search(INVALID, "text", collection=TEXTS, text="x" * 40_000),
    "a text where there is no model": search(PRECONDITION, "", text="text"),
    "no query": Bad("search.Search", pb.SearchRequest(collection=VECTORS), INVALID, "query"),
    "no queries": batch(INVALID, "queries"),
    "no rows": batch(INVALID, "vectors", vectors=pb.Matrix(dim=4)),
    "too many rows": batch(INVALID, "vectors", vectors=matrix(*[[1, 0, 0, 0]] * 2_049)),
    "too many texts": batch(INVALID, "texts", collection=TEXTS, texts=pb.TextList(values=["x"] * 2_049)),
    "an empty text among others": batch(
        INVALID, "texts[1]", collection=TEXTS, texts=pb.TextList(values=["x", ""])
    ),
    "a NaN among others": batch(INVALID, "vectors", vectors=matrix([1, 0, 0, 0], [0, NAN, 0, 0])),
    "more rows than bytes": batch(
        INVALID, "vectors.data", vectors=pb.Matrix(data=b"1", rows=2**32 - 1, dim=4)
    ),
    "batch k of 0": batch(INVALID, "k", vectors=ONE, k=0),
    # -- recommendations
    "nothing liked": recommend(INVALID, "like", like=[]),
    "an empty example": recommend(INVALID, "like[0]", like=[pb.Example()]),
    "an unknown liked id": recommend(
        NOT_FOUND, "like[1].id", like=[pb.Example(id="a"), pb.Example(id="nobody")]
    ),
    "an unknown unliked id": recommend(NOT_FOUND, "unlike[0].id", unlike=[pb.Example(id="nobody")]),
    "a liked NaN": recommend(INVALID, "like[0].vector", like=[pb.Example(vector=matrix([NAN] * 4))]),
    "a liked wrong dimension": recommend(INVALID, "like[0].vector", like=[pb.Example(vector=matrix([1, 2]))]),
    "an empty excluded id": recommend(INVALID, "exclude[0]", exclude=[""]),
    "an unknown ranker": recommend(NOT_FOUND, "rank.ranker", rank=Rank(ranker="no-such")),
    "an unknown feature": recommend(INVALID, "rank.features.colour", rank=Rank(features={"colour": 1})),
    "a feature that is a word": recommend(INVALID, "rank.features.name", rank=Rank(features={"name": 1})),
    "features of a user": recommend(
        UNIMPLEMENTED, "user_features", user_features={"age": pb.Value(int=3)}
    ),
    "a NaN weight": recommend(INVALID, "rank.features.rank", rank=Rank(features={"rank": NAN})),
    "a weight without measure": recommend(INVALID, "rank.features.rank", rank=Rank(features={"rank": 1e300})),
    "lambda over 1": recommend(INVALID, "diversity.mmr_lambda", diversity=Diversity(mmr_lambda=1.1)),
    "groups of an unknown attribute": recommend(
        INVALID, "diversity.group_by", diversity=Diversity(group_by="colour", per_group=1)
    ),
    "no candidates": recommend(INVALID, "retrieve.k", retrieve=Retrieve(k=0)),
    "a bad filter of candidates": recommend(
        INVALID, "retrieve.filter", retrieve=Retrieve(filter=pb.Filter(text="colour = 1"))
    ),
    "recommend k of 0": recommend(INVALID, "k", k=0),
    # -- embeddings
    "no texts": embed(INVALID, "texts", texts=[]),
    "too many texts to embed": embed(INVALID, "texts", texts=["x"] * 2_049),
    "a text over the limit to embed": embed(INVALID, "texts[1]", texts=["x", "x" * 32_769]),
    "an unknown model": embed(NOT_FOUND, "model", model="no-such"),
    "images": embed(INVALID, "images", images=[b"png"]),
    "fewer dimensions": embed(INVALID, "dimensions", dimensions=12),
    "an unknown dtype": embed(INVALID, "dtype", dtype=9),
    "an unknown input type": embed(INVALID, "input_type", input_type=9),
    "no query to rerank": Bad("embedding.Rerank", pb.RerankRequest(texts=["x"]), INVALID, "query"),
    "no texts to rerank": Bad("embedding.Rerank", pb.RerankRequest(query="x"), INVALID, "texts"),
    "no such reranker": Bad(
        "embedding.Rerank", pb.RerankRequest(query="x", texts=["x"], ranker="no-such"), NOT_FOUND, "ranker"
    ),
    # -- collections
    "an empty name": create(INVALID, "name", name=""),
    "a name in capitals": create(INVALID, "name", name="Name"),
    "a name of 129 characters": create(INVALID, "name", name="x" * 129),
    "a name with NUL": create(INVALID, "name", name="a\0"),
    "a name that is taken": create(ALREADY_EXISTS, "name", name=VECTORS),
    "a dimension of 1": create(INVALID, "dim", dim=1),
    "a dimension of 5,000": create(INVALID, "dim", dim=5_000),
    "a dimension that is not the model's": create(INVALID, "dim", model="all-minilm-l6-v2", dim=5),
    "a model that is not there": create(NOT_FOUND, "model", model="no-such"),
    "an attribute's name": create(INVALID, "attributes.a b", attributes={"a b": pb.INT}),
    "an attribute's type": create(INVALID, "attributes.a", attributes={"a": 77}),
    "an unknown metric": create(INVALID, "metric", metric=77),
    "too many slots": create(INVALID, "slots", slots=100_000),
    "too many shards": create(INVALID, "shards", shards=65),
    "too many replicas": create(INVALID, "replicas", replicas=2**32 - 1),
    "an index of no kind": create(INVALID, "index.kind", index=pb.IndexSpec(kind="zzz")),
    "get of no collection": Bad("collection.Get", pb.GetCollectionRequest(name="no-such"), NOT_FOUND, "name"),
    "delete of no collection": Bad(
        "collection.Delete", pb.DeleteCollectionRequest(name="no-such"), NOT_FOUND, "name"
    ),
    "an alias of nothing": Bad(
        "collection.SetAlias", pb.SetAliasRequest(alias="any", collection="no\0such"), NOT_FOUND, "collection"
    ),
    "an alias that is a collection": Bad(
        "collection.SetAlias", pb.SetAliasRequest(alias=TEXTS, collection=VECTORS), ALREADY_EXISTS, "alias"
    ),
    "an alias of no name": Bad(
        "collection.SetAlias", pb.SetAliasRequest(alias="", collection=VECTORS), INVALID, "alias"
    ),
}  # fmt: skip
