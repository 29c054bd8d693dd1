"""Texts to vectors: the same text has the same vector, alone or in a crowd, computed or remembered."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import grpc
import numpy as np
import pytest
from refusal import refusal_of, refused
from rpc import Rpc

from protos.ringfort import v1 as pb
from ringfort import Client

#: From one word to more than the model reads.
TEXTS = [
    "ray",
    "a fast json parser",
    "plot charts in the terminal",
    "an asynchronous web framework for building services, with type hints and validation of requests",
    "the quick brown fox jumps over the lazy dog " * 8,
    "naïve café ☃ 日本語のテキスト",
    "word " * 200,
]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def rows(matrix: pb.Matrix) -> np.ndarray:
    return np.frombuffer(matrix.data, "<f4").reshape(matrix.rows, matrix.dim)


def test_the_same_text_has_the_same_bytes_and_is_remembered(rpc: Rpc) -> None:
    text = f"a text of its own, {uuid4().hex}"
    first = rpc.embedding.Embed(pb.EmbedRequest(texts=[text]))
    again = rpc.embedding.Embed(pb.EmbedRequest(texts=["another " + text, text]))
    assert [row.cached for row in first.rows] == [False]
    assert [row.cached for row in again.rows] == [False, True]
    assert again.vectors.data[-len(first.vectors.data) :] == first.vectors.data
    assert again.rows[1].tokens == first.rows[0].tokens > 0
    assert first.timings.inference_ms > 0
    assert (first.vectors.rows, first.vectors.dim) == (1, 384)
    assert np.linalg.norm(rows(first.vectors)[0]) == pytest.approx(1.0, abs=1e-5)


def test_a_query_and_a_document_are_remembered_apart(rpc: Rpc) -> None:
    text = uuid4().hex
    for input_type in (pb.QUERY, pb.DOCUMENT):
        answer = rpc.embedding.Embed(pb.EmbedRequest(texts=[text], input_type=input_type))
        assert not answer.rows[0].cached


def test_a_text_alone_and_in_a_crowd_have_one_vector(client: Client, collection: str) -> None:
    texts = [f"{text} {uuid4().hex}" for text in TEXTS]
    alone = np.concatenate([client.embed([text]) for text in texts])
    # Documents are embedded anew, whatever was remembered; here between many others of every length.
    crowd = [{"id": f"other {i}", "text": f"filler {i} " * (1 + i % 40)} for i in range(120)]
    ours = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    client.upsert(collection, [*crowd[:60], *ours, *crowd[60:]], batch=len(crowd) + len(ours))
    stored = client.get(collection, [document["id"] for document in ours], include=["vector"])
    for vector, document in zip(alone, stored, strict=True):
        assert document is not None
        assert document.vector is not None
        assert cosine(vector, document.vector) >= 0.99999


def test_texts_asked_for_at_once_by_many_have_one_vector(client: Client) -> None:
    text = uuid4().hex
    with ThreadPoolExecutor(16) as pool:
        vectors = list(pool.map(lambda i: client.embed([f"{text} {i % 4}"]), range(64)))
    for i, vector in enumerate(vectors):
        assert cosine(vector[0], vectors[i % 4][0]) >= 0.99999


def test_what_means_the_same_is_near(client: Client) -> None:
    vectors = client.embed(["parse json quickly", "a fast json parser", "a recipe for apple pie"])
    assert cosine(vectors[0], vectors[1]) > 0.7 > 0.3 > cosine(vectors[0], vectors[2])


def test_a_long_text_is_cut_and_says_so(rpc: Rpc) -> None:
    answer = rpc.embedding.Embed(pb.EmbedRequest(texts=["short", "word " * 1_000]))
    assert [row.truncated for row in answer.rows] == [False, True]
    assert answer.rows[1].tokens == 256
    model = rpc.model.List(pb.ListModelsRequest()).models[0]
    assert answer.rows[1].tokens == model.max_tokens


def test_truncate_takes_what_is_over_the_byte_limit(rpc: Rpc) -> None:
    request = pb.EmbedRequest(texts=["é" * 20_000])
    refusal = refused(lambda: rpc.embedding.Embed(request))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "texts[0]")
    request.truncate = True
    assert rpc.embedding.Embed(request).rows[0].truncated


@pytest.mark.parametrize(("dtype", "row_bytes", "least"), [("F16", 768, 0.999999), ("I8", 384, 0.9999)])
def test_smaller_dtypes_carry_the_same_vectors(
    rpc: Rpc, client: Client, dtype: str, row_bytes: int, least: float
) -> None:
    exact = client.embed(TEXTS)
    message = rpc.embedding.Embed(pb.EmbedRequest(texts=TEXTS, dtype=pb.DType.Value(dtype))).vectors
    assert len(message.data) == row_bytes * len(TEXTS)
    assert len(message.scales) == (4 * len(TEXTS) if dtype == "I8" else 0)
    for vector, wanted in zip(client.embed(TEXTS, dtype=dtype), exact, strict=True):
        assert cosine(vector, wanted) >= least


def test_a_stream_is_answered_in_order(rpc: Rpc) -> None:
    own = uuid4().hex[:6]
    asked = [[f"{own} {i} {j} " * (1 + (i * 7) % 30) for j in range(1 + i % 5)] for i in range(24)]
    answers = list(rpc.embedding.EmbedStream(pb.EmbedRequest(texts=texts) for texts in asked))
    assert [len(answer.rows) for answer in answers] == [len(texts) for texts in asked]
    for texts, answer in zip(asked, answers, strict=True):
        assert rpc.embedding.Embed(pb.EmbedRequest(texts=texts)).vectors.data == answer.vectors.data


def test_a_bad_request_ends_a_stream_after_the_answers_before_it(rpc: Rpc) -> None:
    def asked() -> Iterator[pb.EmbedRequest]:
        yield pb.EmbedRequest(texts=["one"])
        yield pb.EmbedRequest(texts=["two"])
        yield pb.EmbedRequest(texts=["three"], model="no-such-model")

    stream = rpc.embedding.EmbedStream(asked())
    assert [next(stream).vectors.rows, next(stream).vectors.rows] == [1, 1]
    with pytest.raises(grpc.RpcError) as raised:
        next(stream)
    refusal = refusal_of(raised.value)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "model")


def test_rerank_puts_the_best_text_first(client: Client) -> None:
    texts = ["a recipe for apple pie", "a fast json parser", "json schema validation"]
    query = "parse json quickly"
    hits = client.rerank(query, texts)
    asked, made = client.embed([query])[0], client.embed(texts, input_type="DOCUMENT")
    wanted = sorted(range(3), key=lambda i: -cosine(asked, made[i]))
    assert [hit.index for hit in hits] == wanted == [1, 2, 0]
    for hit in hits:
        assert hit.score == pytest.approx(cosine(asked, made[hit.index]), abs=1e-5)
    assert [hit.index for hit in client.rerank(query, texts, top_n=1)] == [1]
