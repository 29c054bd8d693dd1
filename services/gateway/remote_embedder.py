"""A model on other processes: EmbedderEndpoint and ImageEmbedderEndpoint over gRPC.

Every process that runs the model is asked alike; a call goes to the less busy of two, and once more to
another where the first went away meanwhile.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from index_builder.models.manifest import ModelManifest
from protos.ringfort.internal import v1 as internal
from services.deadline import Deadline
from services.embedder.embedder import Embedded, InputType, text_size
from services.embedder.images import EmbeddedImages
from services.embedder.node import embedded_from, images_from
from services.gateway.coalescer import Coalescer
from services.peers import Peer
from shard_router.errors import EmbedderUnavailable, Unavailable

if TYPE_CHECKING:
    from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeAsyncStub

log = logging.getLogger(__name__)

T = TypeVar("T")
EmbedderPeer: TypeAlias = "Peer[EmbedderNodeAsyncStub]"

#: Calls of a kind that one process has under way.
_IN_FLIGHT = 2
_TRIES = 2


@dataclass(slots=True)
class _Asked:
    """A process that runs the model."""

    peer: EmbedderPeer
    #: Texts or pictures that it has been asked for and not answered.
    outstanding: int = 0


class Replicas:
    """The processes that run one model."""

    def __init__(self, model: str, rng: random.Random) -> None:
        self._model, self._rng = model, rng
        self._asked: dict[str, _Asked] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def join(self, name: str, peer: EmbedderPeer) -> None:
        """Ask that process too, from now on; whoever makes the peer leaves it to us."""
        self._asked[name] = _Asked(peer)

    async def leave(self, name: str) -> None:
        """Ask that process nothing more."""
        if (asked := self._asked.pop(name, None)) is not None:
            await asked.peer.close()

    async def close(self) -> None:
        """Ask no process any more."""
        for name in list(self._asked):
            await self.leave(name)

    async def ask(
        self,
        count: int,
        deadline: Deadline,
        call: Callable[["EmbedderNodeAsyncStub", EmbedderPeer], Awaitable[T]],
    ) -> T:
        """What one of them answers for `count` texts or pictures; EmbedderUnavailable where none does."""
        tried: set[str] = set()
        why = "none has joined"
        for _ in range(_TRIES):
            name = self._chosen(tried)
            if name is None:
                break
            asked = self._asked[name]
            tried.add(name)
            deadline.require("the embedder")
            asked.outstanding += count
            try:
                with asked.peer.calling() as stub:
                    return await call(stub, asked.peer)
            except EmbedderUnavailable:
                raise
            except Unavailable as error:
                log.warning("%s", error)
                why = str(error)
            finally:
                asked.outstanding -= count
        raise EmbedderUnavailable(self._model, why)

    def _chosen(self, tried: set[str]) -> str | None:
        names = [name for name in self._asked if name not in tried]
        if len(names) > 2:
            names = self._rng.sample(names, 2)
        return min(names, key=lambda name: self._asked[name].outstanding, default=None)


class RemoteEmbedder:
    """A model of texts on other processes; calls of one turn and one kind travel together."""

    def __init__(
        self,
        manifest: ModelManifest,
        replicas: Replicas,
        on_close: Callable[[], Awaitable[None]],
        *,
        queue_texts: int = 8_192,
    ) -> None:
        """`on_close` ends the processes. At most `queue_texts` wait or are under way."""
        self.manifest = manifest
        self._replicas, self._on_close = replicas, on_close
        self._coalescer: Coalescer[InputType, Sequence[str], Embedded] = Coalescer(
            self._send, f"embedding by {manifest.model}", queue_rows=queue_texts
        )
        self._texts = 0
        self._inference_ms = 0.0
        self._closed = False

    async def embed(self, texts: Sequence[str], input_type: InputType, deadline: Deadline) -> Embedded:
        """A vector for each text, in order; the errors of `Embedder.embed`."""
        if self._closed:
            raise EmbedderUnavailable(self.manifest.model, "it is closing")
        # Here, so that one caller's mistake does not fail those it would travel with.
        for i, text in enumerate(texts):
            text_size(i, text)
        self._coalescer.in_flight = _IN_FLIGHT * max(1, len(self._replicas))
        embedded = await self._coalescer.ask(input_type, texts, len(texts), deadline)
        embedded.tell_stages()
        return embedded

    async def close(self) -> None:
        """Ask them nothing more."""
        self._closed = True
        await self._coalescer.close()
        await self._on_close()

    def stats(self) -> dict[str, float]:
        """Figures of this side; each process has its own."""
        return {
            "replicas": len(self._replicas),
            "queue_texts": self._coalescer.rows,
            "texts_total": self._texts,
            "abandoned_texts_total": self._coalescer.abandoned_rows,
            "calls_total": self._coalescer.calls,
            "batches_total": self._coalescer.batches,
            "inference_ms_total": self._inference_ms,
        }

    async def _send(
        self, input_type: InputType, calls: Sequence[Sequence[str]], deadline: Deadline
    ) -> Sequence[Embedded]:
        texts = [text for call in calls for text in call]
        request = internal.EmbedRequest(texts=texts, input_type=input_type.value)

        async def embed(stub: "EmbedderNodeAsyncStub", peer: EmbedderPeer) -> internal.EmbedResponse:
            left_s = deadline.require("the embedder")
            return await stub.Embed(request, timeout=left_s, metadata=peer.metadata)

        answer = await self._replicas.ask(len(texts), deadline, embed)
        made = embedded_from(answer, self.manifest.dim)
        self._texts += len(texts)
        self._inference_ms += made.inference_ms
        answers, at = [], 0
        for rows in map(len, calls):
            part = slice(at, at + rows)
            times = (made.queue_ms, made.tokenize_ms, made.inference_ms)
            answers.append(Embedded(made.vectors[part], made.tokens[part], made.truncated[part], *times))
            at += rows
        return answers


class RemoteImageEmbedder:
    """A model of pictures on other processes."""

    def __init__(
        self, manifest: ModelManifest, replicas: Replicas, on_close: Callable[[], Awaitable[None]]
    ) -> None:
        """`on_close` ends the processes."""
        self.manifest = manifest
        self._replicas, self._on_close = replicas, on_close

    async def embed(self, images: Sequence[bytes], deadline: Deadline) -> EmbeddedImages:
        """A vector for each encoded picture, in order; the errors of `ImageEmbedder.embed`."""
        request = internal.EmbedImagesRequest(images=images)

        async def embed(stub: "EmbedderNodeAsyncStub", peer: EmbedderPeer) -> internal.EmbedImagesResponse:
            left_s = deadline.require("the embedder")
            return await stub.EmbedImages(request, timeout=left_s, metadata=peer.metadata)

        return images_from(await self._replicas.ask(len(images), deadline, embed), self.manifest.dim)

    async def close(self) -> None:
        """Ask them nothing more."""
        await self._on_close()
