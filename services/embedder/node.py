"""A process's model, as other processes ask it: the service EmbedderNode of protos/ringfort/internal."""

import numpy as np

from protos.ringfort.internal import v1 as internal
from services.deadline import Deadline
from services.embedder.embedder import Embedded, Embedder, InputType
from services.embedder.images import EmbeddedImages, ImageEmbedder
from shard_router.errors import InvalidField


class EmbedderNode:
    """One model, of texts or of pictures; who makes it closes it."""

    def __init__(self, embedder: Embedder | ImageEmbedder) -> None:
        self._embedder = embedder

    async def Embed(self, request: internal.EmbedRequest, deadline: Deadline) -> internal.EmbedResponse:
        """See `Embedder.embed`."""
        if not isinstance(self._embedder, Embedder):
            raise InvalidField("texts", f"model {self._embedder.manifest.model} takes images")
        return embedded_on_wire(
            await self._embedder.embed(request.texts, InputType(request.input_type), deadline)
        )

    async def EmbedImages(
        self, request: internal.EmbedImagesRequest, deadline: Deadline
    ) -> internal.EmbedImagesResponse:
        """See `ImageEmbedder.embed`."""
        if not isinstance(self._embedder, ImageEmbedder):
            raise InvalidField("images", f"model {self._embedder.manifest.model} takes texts")
        made = await self._embedder.embed(request.images, deadline)
        return internal.EmbedImagesResponse(
            vectors=made.vectors.tobytes(),
            queue_ms=made.queue_ms,
            decode_ms=made.decode_ms,
            inference_ms=made.inference_ms,
        )

    async def Describe(
        self, request: internal.DescribeRequest, deadline: Deadline
    ) -> internal.DescribeResponse:
        """Which model it is, and how it does."""
        stats = self._embedder.stats() if isinstance(self._embedder, Embedder) else {}
        return internal.DescribeResponse(manifest=self._embedder.manifest.encode(), stats=stats)


def embedded_on_wire(made: Embedded) -> internal.EmbedResponse:
    """Embedded texts as a message."""
    return internal.EmbedResponse(
        vectors=made.vectors.tobytes(),
        tokens=made.tokens.tolist(),
        truncated=made.truncated.tobytes(),
        queue_ms=made.queue_ms,
        tokenize_ms=made.tokenize_ms,
        inference_ms=made.inference_ms,
    )


def embedded_from(message: internal.EmbedResponse, dim: int) -> Embedded:
    """Embedded texts of a model of `dim` dimensions."""
    return Embedded(
        np.frombuffer(message.vectors, np.float32).reshape(-1, dim),
        np.array(message.tokens, np.int32),
        np.frombuffer(message.truncated, np.bool_),
        message.queue_ms,
        message.tokenize_ms,
        message.inference_ms,
    )


def images_from(message: internal.EmbedImagesResponse, dim: int) -> EmbeddedImages:
    """Embedded pictures of a model of `dim` dimensions."""
    vectors = np.frombuffer(message.vectors, np.float32).reshape(-1, dim)
    return EmbeddedImages(vectors, message.queue_ms, message.decode_ms, message.inference_ms)
