"""Embeds texts for many callers at once: one bounded queue, threads that cut batches out of it."""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from index_builder.models.engine import EngineUnavailable
from index_builder.models.manifest import ModelManifest
from index_builder.models.tokenizer import padded
from services.deadline import Deadline
from services.embedder.batching import Infer, Row, Tokenize, WaitingTexts
from services.embedder.onnx_model import OnnxModel
from services.embedder.profiling import Profile, profile
from services.telemetry import stage
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable, InvalidField, Overloaded, RingfortError

COUNTERS = (
    "texts_total",
    "tokens_total",
    "padded_tokens_total",
    "batches_total",
    "failed_batches_total",
    "rejected_texts_total",
    "abandoned_texts_total",
    "tokenize_ms_total",
    "inference_ms_total",
)

log = logging.getLogger(__name__)

#: A batch that nobody else runs or waits beside is still not taken for alone so soon after company: who comes
#: while all threads run it would wait longer than it gains.
_COMPANY_BATCHES = 8

_QUEUE, _TOKENIZE, _INFERENCE = stage("queue"), stage("tokenize"), stage("inference")


class InputType(StrEnum):
    """What a text is to the search; models may put different prompts before them."""

    QUERY = "query"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Embedded:
    """Texts as vectors, in the order they came.

    The times add up to what the call took: from when its first text was taken up until all were tokenized,
    from its first batch until its last vector, and the rest waiting.
    """

    #: float32 [n, dim], of length 1.
    vectors: np.ndarray
    #: int32 [n]: tokens the model read.
    tokens: np.ndarray
    #: bool [n]: the text was longer than the model reads.
    truncated: np.ndarray
    queue_ms: float
    tokenize_ms: float
    inference_ms: float

    def tell_stages(self) -> None:
        """A call has just got this: count its stages, wherever the model ran."""
        tokenize_s, inference_s = self.tokenize_ms / 1e3, self.inference_ms / 1e3
        _QUEUE.took(self.queue_ms / 1e3, tokenize_s + inference_s)
        _TOKENIZE.took(tokenize_s, inference_s)
        _INFERENCE.took(inference_s)


@dataclass(slots=True)
class _Call:
    """One embed() under way."""

    texts: Sequence[str]
    prompt: str
    future: asyncio.Future[None]
    came_s: float
    vectors: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    #: Rows without a vector yet.
    left: int
    #: Token ids of rows that are tokenized and wait for a batch.
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    #: When its first text was taken up, all were tokenized, its first batch began, its last vector came.
    taken_s: float = math.inf
    tokenized_s: float = 0.0
    begun_s: float = math.inf
    done_s: float = 0.0

    def answer(self) -> Embedded:
        """What its caller gets, once every row has its vector."""
        total_ms = (self.done_s - self.came_s) * 1000
        tokenize_ms = (self.tokenized_s - self.taken_s) * 1000
        inference_ms = (self.done_s - self.begun_s) * 1000
        # A large call may begin to run before all of it is tokenized.
        queue_ms = max(0.0, total_ms - tokenize_ms - inference_ms)
        return Embedded(self.vectors, self.tokens, self.truncated, queue_ms, tokenize_ms, inference_ms)


class Embedder:
    """One model, embedding for many callers at once, fairly, and never past a caller's deadline.

    `workers` threads run a batch each, tokenizing included, off the event loop and without the GIL. Texts
    of all callers are batched together by length; a call is spread over as many batches as it fills.
    At most `queue_texts` wait. `batch_tokens` is a batch's size in padded tokens: on a CPU core nothing is
    gained beyond some 300, and whoever comes next waits for what runs.
    """

    def __init__(
        self,
        model: OnnxModel,
        *,
        workers: int,
        queue_texts: int = 8192,
        batch_tokens: int = 384,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._clock = model, clock
        self._queue_texts, self._batch_tokens = queue_texts, batch_tokens
        self._ids = itertools.count()
        self._counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        #: Guards everything below it, and is notified when there is something to take.
        self._changed = threading.Condition()
        self._waiting = WaitingTexts(batch_tokens)
        self._calls: dict[int, _Call] = {}
        #: Why no call is taken any more.
        self._closed: str | None = None
        #: Workers that have something in hand; each has, until it first asks for work.
        self._busy = workers
        #: Batches since one last had company.
        self._alone = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"embedder-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def manifest(self) -> ModelManifest:
        """What is being run."""
        return self._model.manifest

    async def embed(self, texts: Sequence[str], input_type: InputType, deadline: Deadline) -> Embedded:
        """A vector for each text, in order. A cancelled call leaves the queue at once.

        Overloaded where the queue cannot take all of `texts`; DeadlineExceeded; InvalidField for a text
        with lone surrogates; EmbedderUnavailable where the model failed or the embedder is closing.
        """
        left_s = deadline.require("embedder queue")
        call = self._call(texts, input_type)
        if not texts:
            return Embedded(call.vectors, call.tokens, call.truncated, 0.0, 0.0, 0.0)
        text_bytes = [text_size(i, text) for i, text in enumerate(texts)]
        with self._changed:
            if self._closed:
                raise EmbedderUnavailable(self.manifest.model, self._closed)
            if self._waiting.rows + len(texts) > self._queue_texts:
                self._counts["rejected_texts_total"] += len(texts)
                raise Overloaded("embedder queue", self._queue_texts)
            number = next(self._ids)
            self._calls[number] = call
            self._waiting.add(number, text_bytes, deadline_s=call.came_s + left_s)
            self._changed.notify()
        timer = call.future.get_loop().call_later(left_s, _expire, call.future, "embedding")
        try:
            await call.future
        finally:
            timer.cancel()
            if call.left:
                with self._changed:
                    if self._calls.pop(number, None) is not None:
                        self._counts["abandoned_texts_total"] += call.left
                    self._waiting.drop(number)
        embedded = call.answer()
        embedded.tell_stages()
        return embedded

    async def profile(self, seconds: float) -> Profile:
        """Which operators take the time of the next batches, for so long at most; EmbedderUnavailable."""
        try:
            return await profile(self._model.engine, seconds)
        except EngineUnavailable as error:
            raise EmbedderUnavailable(self.manifest.model, str(error)) from error

    async def close(self) -> None:
        """Fail what waits, finish what runs, end the threads."""
        with self._changed:
            self._refuse("it is closing")
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def stats(self) -> dict[str, float]:
        """Counters of texts, tokens, batches and failures, and what waits now."""
        with self._changed:
            waiting, counts = self._waiting.rows, dict(self._counts)
        return {"queue_texts": waiting, "workers": len(self._threads), **counts}

    def _call(self, texts: Sequence[str], input_type: InputType) -> _Call:
        n = len(texts)
        return _Call(
            texts=texts,
            prompt=self.manifest.prompts.get(input_type.value, ""),
            future=asyncio.get_running_loop().create_future(),
            came_s=self._clock(),
            vectors=np.empty((n, self.manifest.dim), np.float32),
            tokens=np.empty(n, np.int32),
            truncated=np.empty(n, np.bool_),
            left=n,
        )

    # Below: on the worker threads.

    def _work(self) -> None:
        try:
            self._serve()
        except Exception:
            log.exception("embedder is down model=%s", self.manifest.model)
            with self._changed:
                self._refuse("its queue failed")

    def _serve(self) -> None:
        while (taken := self._next()) is not None:
            work, alone = taken
            try:
                if isinstance(work, Tokenize):
                    self._tokenize(work.rows)
                else:
                    self._infer(work.rows, alone)
            except Exception as error:  # whatever went wrong, these callers must hear of it
                log.exception("embedding failed model=%s", self.manifest.model)
                with self._changed:
                    self._counts["failed_batches_total"] += 1
                    for number in {row.call for row in work.rows}:
                        self._fail(number, EmbedderUnavailable(self.manifest.model, str(error)))

    def _next(self) -> tuple[Tokenize | Infer, bool] | None:
        """The next piece of work as soon as there is one, and whether it has the CPUs to itself; None once
        the embedder closes.
        """
        with self._changed:
            self._busy -= 1
            while True:
                work, late, more = self._waiting.take(self._clock())
                for number in late:
                    self._fail(number, DeadlineExceeded("embedder queue"))
                if more:
                    self._changed.notify()
                if work is not None:
                    self._busy += 1
                    if self._busy > 1 or more:
                        self._alone = 0
                    elif isinstance(work, Infer):
                        self._alone += 1
                    return work, self._alone > _COMPANY_BATCHES
                if self._closed:
                    return None
                self._changed.wait()

    def _calls_of(self, rows: Sequence[Row]) -> list[tuple[_Call, Row]]:
        """Rows with their calls, less those whose callers have gone."""
        with self._changed:
            calls = [self._calls.get(row.call) for row in rows]
        return [(call, row) for row, call in zip(rows, calls, strict=True) if call is not None]

    def _tokenize(self, rows: Sequence[Row]) -> None:
        """Tokenize some texts, so that they can be batched."""
        began_s = self._clock()
        wanted = self._calls_of(rows)
        tokens = self._model.tokenizer.encode([call.prompt + call.texts[row.row] for call, row in wanted])
        for (call, row), ids, truncated in zip(wanted, tokens.ids, tokens.truncated, strict=True):
            call.ids[row.row] = ids
            call.tokens[row.row] = len(ids)
            call.truncated[row.row] = truncated
        done_s = self._clock()
        with self._changed:
            for call, _ in wanted:
                call.taken_s = min(call.taken_s, began_s)
                call.tokenized_s = max(call.tokenized_s, done_s)
            self._waiting.tokenized([row for _, row in wanted], [len(ids) for ids in tokens.ids])
            self._counts["tokenize_ms_total"] += (done_s - began_s) * 1000

    def _infer(self, rows: Sequence[Row], alone: bool) -> None:
        """Run a batch and hand its vectors to their calls; those that are complete are answered."""
        began_s = self._clock()
        wanted = self._calls_of(rows)
        if not wanted:
            return
        ids, mask = padded([call.ids.pop(row.row) for call, row in wanted])
        vectors = self._model.encode(ids, mask, alone=alone)
        for vector, (call, row) in zip(vectors, wanted, strict=True):
            call.vectors[row.row] = vector
        done_s = self._clock()
        complete = []
        with self._changed:
            for call, row in wanted:
                call.left -= 1
                call.begun_s = min(call.begun_s, began_s)
                call.done_s = max(call.done_s, done_s)
                if not call.left and self._calls.pop(row.call, None) is not None:
                    complete.append(call.future)
            self._counts["batches_total"] += 1
            self._counts["texts_total"] += len(wanted)
            self._counts["tokens_total"] += int(mask.sum())
            self._counts["padded_tokens_total"] += mask.size
            self._counts["inference_ms_total"] += (done_s - began_s) * 1000
        _settle(complete, None)

    def _refuse(self, why: str) -> None:
        """Take no more calls, and fail those that have texts waiting."""
        self._closed = why
        for number in self._waiting.calls():
            self._fail(number, EmbedderUnavailable(self.manifest.model, why))
        self._changed.notify_all()

    def _fail(self, number: int, error: RingfortError) -> None:
        """End a call with an error; its other rows are not embedded."""
        self._waiting.drop(number)
        call = self._calls.pop(number, None)
        if call is not None:
            _settle([call.future], error)


def text_size(index: int, text: str) -> int:
    """Bytes of a text, or InvalidField where UTF-8 could not carry it."""
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidField(f"texts[{index}]", f"not Unicode text ({error.reason})") from None


def _expire(future: asyncio.Future[None], stage: str) -> None:
    """End a wait whose time is up."""
    if not future.done():
        future.set_exception(DeadlineExceeded(stage))


def _settle(futures: Sequence[asyncio.Future[None]], error: RingfortError | None) -> None:
    """Resolve futures from any thread, waking each event loop once; one that is closed needs no answer."""

    def settle(futures: Sequence[asyncio.Future[None]]) -> None:
        for future in futures:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    for loop in {future.get_loop() for future in futures}:
        try:
            loop.call_soon_threadsafe(settle, [future for future in futures if future.get_loop() is loop])
        except RuntimeError:
            log.debug("a caller's event loop closed before its answer")
