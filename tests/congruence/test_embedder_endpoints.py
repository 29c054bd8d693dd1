"""A model embeds the same whether it is in this process or on a node."""

import asyncio

import numpy as np
import pytest

from index_builder.models.tokenizer import padded
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.embedder.onnx_model import OnnxModel
from services.gateway.endpoints import EmbedderEndpoint
from services.trace import CURRENT, Trace
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable, InvalidField, Overloaded

TEXTS = ["a", "how to bake bread", "word " * 2_000, ""]


def soon() -> Deadline:
    return Deadline.after(60)


async def test_every_text_has_its_vector(embedder: EmbedderEndpoint, model: OnnxModel) -> None:
    made = await embedder.embed(TEXTS, InputType.DOCUMENT, soon())
    tokens = model.tokenizer.encode(TEXTS)
    for i, ids in enumerate(tokens.ids):
        alone = model.encode(*padded([ids]))[0]
        np.testing.assert_allclose(made.vectors[i], alone, atol=1e-4)
    assert made.tokens.tolist() == [len(ids) for ids in tokens.ids]
    assert made.truncated.tolist() == [False, False, True, False]
    assert made.vectors.dtype == np.float32
    assert embedder.manifest.model == model.manifest.model


async def test_callers_get_their_own(embedder: EmbedderEndpoint) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    together = await embedder.embed(words, InputType.QUERY, soon())
    apart = await asyncio.gather(*(embedder.embed([word] * 2, InputType.QUERY, soon()) for word in words))
    for vector, made in zip(together.vectors, apart, strict=True):
        assert made.vectors.shape == (2, 384)
        np.testing.assert_allclose(made.vectors, [vector, vector], atol=1e-4)
    assert (await embedder.embed([], InputType.QUERY, soon())).vectors.shape == (0, 384)


async def test_what_cannot_be_done_is_refused_alike(embedder: EmbedderEndpoint) -> None:
    with pytest.raises(InvalidField) as refused:
        await embedder.embed(["fine", "\ud800"], InputType.QUERY, soon())
    assert refused.value.field == "texts[1]"
    with pytest.raises(DeadlineExceeded):
        await embedder.embed(["late"], InputType.QUERY, Deadline.after(-1))
    with pytest.raises(Overloaded) as full:
        await embedder.embed(["x"] * 65, InputType.QUERY, soon())
    assert (full.value.limit, full.value.retry_after_ms) == (64, 100)


async def test_closed_it_embeds_nothing(embedder: EmbedderEndpoint) -> None:
    await embedder.close()
    with pytest.raises(EmbedderUnavailable):
        await embedder.embed(["x"], InputType.QUERY, soon())


async def test_the_trace_of_a_call_hears_of_its_stages(embedder: EmbedderEndpoint) -> None:
    spans: dict[str, float] = {}
    token = CURRENT.set(Trace("ab" * 16, lambda name, seconds, ago_s: spans.update({name: seconds})))
    try:
        made = await embedder.embed(["traced"], InputType.QUERY, soon())
    finally:
        CURRENT.reset(token)
    assert spans == {
        "embedder.queue": made.queue_ms / 1e3,
        "embedder.tokenize": made.tokenize_ms / 1e3,
        "embedder.inference": made.inference_ms / 1e3,
    }
