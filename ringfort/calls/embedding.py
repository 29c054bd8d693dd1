"""Calls of the EmbeddingService."""

from collections.abc import Sequence

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.calls.call import Call
from ringfort.documents import Vector
from ringfort.errors import InvalidArgument
from ringfort.results import RerankHit


def embed(
    texts: Sequence[str] = (),
    *,
    images: Sequence[bytes] = (),
    model: str | None = None,
    input_type: str = "QUERY",
    dimensions: int = 0,
    dtype: str = "F32",
    truncate: bool = False,
    traffic_key: str = "",
) -> Call[pb.EmbedResponse, Vector]:
    """The vectors of the texts, or of encoded pictures by an image model, float32 [n, dim].

    `input_type` is QUERY or DOCUMENT; `dtype` is how they travel (F32, F16 or I8); `truncate` cuts texts
    over the byte limit where they would be refused. Requests of one `traffic_key` (by default the first text)
    meet the same version of a model while another is tried out.
    """
    if isinstance(texts, str):
        raise InvalidArgument("texts: a sequence of texts is needed, not one string", field="texts")
    request = pb.EmbedRequest(
        model=model or "",
        texts=texts,
        images=images,
        input_type=wire.enum_value(pb.InputType, input_type, "input_type"),
        dimensions=dimensions,
        dtype=wire.enum_value(pb.DType, dtype, "dtype"),
        truncate=truncate,
        traffic_key=traffic_key,
    )
    return sent(request)


def sent(request: pb.EmbedRequest) -> Call[pb.EmbedResponse, Vector]:
    """The call of a request that is there already."""
    return Call("EmbeddingService/Embed", request, pb.EmbedResponse, _vectors)


def _vectors(answer: pb.EmbedResponse) -> Vector:
    return wire.from_matrix(answer.vectors)


def rerank(
    query: str, texts: Sequence[str], *, ranker: str = "", top_n: int = 0
) -> Call[pb.RerankResponse, list[RerankHit]]:
    """The texts scored against the query, best first; 0 for `top_n` means all."""
    request = pb.RerankRequest(ranker=ranker, query=query, texts=texts, top_n=top_n)
    return Call("EmbeddingService/Rerank", request, pb.RerankResponse, _reranked)


def _reranked(answer: pb.RerankResponse) -> list[RerankHit]:
    return [RerankHit(hit.index, hit.score) for hit in answer.hits]
