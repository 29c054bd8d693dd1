"""Calls of the SearchService."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.calls.call import Call
from ringfort.documents import Attributes, Vector, WriteToken
from ringfort.errors import InvalidArgument
from ringfort.results import BatchSearchResult, SearchResult

E = TypeVar("E")

#: A document's id, a vector [dim], or {"text": "…"}.
Example = str | Vector | Mapping[str, str]


def search(
    collection: str,
    *,
    text: str | None = None,
    vector: Vector | None = None,
    id: str | None = None,
    k: int = 10,
    filter: str | pb.Filter | None = None,
    mode: str = "DENSE",
    effort: float | None = None,
    recall: float | None = None,
    exact: bool = False,
    include: Iterable[str] | None = None,
    read_after: WriteToken | None = None,
    min_coverage: float = 0.0,
    max_staleness_ms: int | None = None,
    cache: bool = True,
    traffic_key: str = "",
) -> Call[pb.SearchResponse, SearchResult]:
    """The k best documents for a text, a vector (float32 [dim]) or a stored document, best first.

    `filter` is text (`downloads_rank < 500`) or a message; `effort` trades time for recall from 0 to 1, or
    `recall` names the share of the true nearest to expect; `exact` compares with every document;
    `read_after` waits for that write; `min_coverage` refuses an answer from fewer shards;
    `max_staleness_ms` allows a cached answer that old, `cache=False` none; requests of one `traffic_key`
    (by default the text) meet the same versions of models while one is tried out.
    """
    if (text is not None) + (vector is not None) + (id is not None) != 1:
        raise InvalidArgument("query: exactly one of text, vector and id is needed", field="query")
    request = pb.SearchRequest(
        collection=collection,
        mode=wire.enum_value(pb.Mode, mode, "mode"),
        k=_k(k),
        filter=wire.to_filter(filter),
        effort=effort,
        recall=recall,
        exact=exact,
        include=wire.to_include(include),
        read_after=wire.to_token(read_after),
        min_coverage=min_coverage,
        max_staleness_ms=max_staleness_ms,
        cache=_cache(cache),
        traffic_key=traffic_key,
    )
    if text is not None:
        request.text = text
    elif id is not None:
        request.id = id
    else:
        wire.put_vector(request.vector, vector, "vector")
    return Call("SearchService/Search", request, pb.SearchResponse, SearchResult)


def batch_search(
    collection: str,
    *,
    texts: Sequence[str] | None = None,
    vectors: Vector | None = None,
    k: int = 10,
    filter: str | pb.Filter | None = None,
    mode: str = "DENSE",
    effort: float | None = None,
    recall: float | None = None,
    exact: bool = False,
    read_after: WriteToken | None = None,
    min_coverage: float = 0.0,
    max_staleness_ms: int | None = None,
    cache: bool = True,
    traffic_key: str = "",
) -> Call[pb.BatchSearchResponse, BatchSearchResult]:
    """The k best ids for each of many texts, or of many vectors (float32 [n, dim]).

    The options are those of `search` and hold for all queries.
    """
    if (texts is None) == (vectors is None):
        raise InvalidArgument("queries: exactly one of texts and vectors is needed", field="queries")
    request = pb.BatchSearchRequest(
        collection=collection,
        vectors=None if vectors is None else wire.to_matrix(vectors, "vectors"),
        texts=None if texts is None else pb.TextList(values=texts),
        mode=wire.enum_value(pb.Mode, mode, "mode"),
        k=_k(k),
        filter=wire.to_filter(filter),
        effort=effort,
        recall=recall,
        exact=exact,
        read_after=wire.to_token(read_after),
        min_coverage=min_coverage,
        max_staleness_ms=max_staleness_ms,
        cache=_cache(cache),
        traffic_key=traffic_key,
    )
    return Call("SearchService/BatchSearch", request, pb.BatchSearchResponse, BatchSearchResult)


def recommend(
    collection: str,
    *,
    like: Sequence[Example] = (),
    unlike: Sequence[Example] = (),
    exclude: Sequence[str] = (),
    k: int = 10,
    filter: str | pb.Filter | None = None,
    candidates: int | None = None,
    effort: float | None = None,
    recall: float | None = None,
    rank: Mapping[str, float] | None = None,
    ranker: str = "",
    mmr_lambda: float | None = None,
    group_by: str = "",
    per_group: int = 0,
    user_features: Attributes | None = None,
    context_features: Attributes | None = None,
    include: Iterable[str] | None = None,
    read_after: WriteToken | None = None,
    min_coverage: float = 0.0,
    max_staleness_ms: int | None = None,
    cache: bool = True,
    traffic_key: str = "",
) -> Call[pb.RecommendResponse, SearchResult]:
    """The k best documents near those liked and away from those unliked: retrieved, ranked, diversified.

    An example is a document's id, a vector (float32 [dim]) or {"text": "…"}. `candidates` are retrieved
    (by default 100); `rank` weighs features (`similarity`, or a numeric or boolean attribute);
    `mmr_lambda` trades relevance (1) for diversity (0); `per_group` bounds the hits with one value of
    `group_by`. `ranker` is NAME or NAME@VERSION of a registered one; what `rank` weighs goes before its
    weights.
    """
    request = pb.RecommendRequest(
        collection=collection,
        like=[_example(example, "like") for example in _several(like, "like")],
        unlike=[_example(example, "unlike") for example in _several(unlike, "unlike")],
        exclude=_several(exclude, "exclude"),
        user_features=wire.to_values(user_features or {}, "user_features"),
        context_features=wire.to_values(context_features or {}, "context_features"),
        retrieve=pb.RecommendRequest.Retrieve(
            k=candidates, filter=wire.to_filter(filter), effort=effort, recall=recall
        ),
        rank=pb.RecommendRequest.Rank(ranker=ranker, features=rank),
        diversity=pb.RecommendRequest.Diversity(
            mmr_lambda=mmr_lambda, group_by=group_by, per_group=per_group
        ),
        k=_k(k),
        include=wire.to_include(include),
        read_after=wire.to_token(read_after),
        min_coverage=min_coverage,
        max_staleness_ms=max_staleness_ms,
        cache=_cache(cache),
        traffic_key=traffic_key,
    )
    return Call("SearchService/Recommend", request, pb.RecommendResponse, SearchResult)


def _several(examples: Sequence[E], field: str) -> Sequence[E]:
    if isinstance(examples, (str, Mapping)):
        raise InvalidArgument(f"{field}: a sequence of examples is needed, not a single one", field=field)
    return examples


def _example(example: Example, field: str) -> pb.Example:
    match example:
        case str():
            return pb.Example(id=example)
        case {"text": str() as text}:
            return pb.Example(text=text)
        case _:
            return pb.Example(vector=_matrix(example, field))


def _matrix(vector: object, field: str) -> pb.Matrix:
    return wire.to_matrix(wire.to_vector(vector, field)[None, :], field)


def _k(k: int) -> int:
    # The limit above is the service's to know; below 1 the message could not even say it.
    if k < 1:
        raise InvalidArgument(f"k: {k} is less than 1", field="k")
    return k


def _cache(cache: bool) -> pb.CacheControl.ValueType:
    return pb.DEFAULT if cache else pb.BYPASS
