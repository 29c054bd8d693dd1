"""Calls of Embed that are made together, sent as one and answered each for itself."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from protos.ringfort import v1 as pb
from ringfort.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, RingfortError

#: Texts that a client sends as one, unless it is told otherwise.
EMBED_TOGETHER = 32
#: Characters of texts that are sent as one: whoever shares a call waits until the model has read all of it.
MOST_CHARS = 2_048
#: Calls are sent apart for so long after some would have met different versions of a model.
APART_S = 30.0

#: A call, and the seconds it has.
Send = Callable[[pb.EmbedRequest, float], Awaitable[pb.EmbedResponse]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call, when its time is over, and where its answer is awaited."""

    request: pb.EmbedRequest
    until_s: float
    answer: asyncio.Future[pb.EmbedResponse]


class Together:
    """Sends calls of one turn of the event loop that differ in their texts only as one; for one loop.

    A lone call is sent as it is, a turn later. What one of them is refused for is told to that one alone: all
    are sent again, each by itself. Whoever leaves does not take the others' answers along.
    """

    def __init__(self, send: Send, most: int, timeout_s: float) -> None:
        """most: texts that are sent as one. timeout_s: what each call has."""
        self._send, self._most, self._timeout_s = send, most, timeout_s
        self._waiting: list[_Waiting] = []
        #: Those on their way; the loop itself does not hold them.
        self._tasks: set[asyncio.Task[None]] = set()
        #: Until when calls are sent apart, on the loop's clock.
        self._apart_until_s = 0.0

    async def send(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """The answer to a call; RingfortError."""
        loop = asyncio.get_running_loop()
        if not self._shares(request) or loop.time() < self._apart_until_s:
            return await self._send(request, self._timeout_s)
        mine = _Waiting(request, loop.time() + self._timeout_s, loop.create_future())
        self._waiting.append(mine)
        # The first of a turn waits until the turn is over, and sees to all that came in it.
        if self._waiting[0] is mine:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                mine.answer.cancel()
                raise
            finally:
                waiting, self._waiting = self._waiting, []
                if len(waiting) > 1:
                    self._send_all(waiting)
            if len(waiting) == 1:
                return await self._send(request, self._timeout_s)
        return await mine.answer

    def _shares(self, request: pb.EmbedRequest) -> bool:
        """Whether a call leaves room for another."""
        texts = request.texts
        return not request.images and 0 < len(texts) < self._most and _chars(request) < MOST_CHARS

    def _send_all(self, waiting: Sequence[_Waiting]) -> None:
        for calls in _alike([call for call in waiting if not call.answer.done()], self._most):
            task = asyncio.create_task(self._send_as_one(calls), name="embed together")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            for call in calls:
                call.answer.add_done_callback(_end_if_all_left(task, calls))

    async def _send_as_one(self, calls: Sequence[_Waiting]) -> None:
        left_s = max(0.0, min(call.until_s for call in calls) - asyncio.get_running_loop().time())
        try:
            if len(calls) == 1:
                _settle(calls[0], await self._send(calls[0].request, left_s))
                return
            together = pb.EmbedRequest()
            together.CopyFrom(calls[0].request)
            together.together = True
            for call in calls[1:]:
                together.texts.extend(call.request.texts)
            answers = parts(await self._send(together, left_s), _sizes(calls))
            for call, answer in zip(calls, answers, strict=True):
                _settle(call, answer)
        except RingfortError as error:
            if len(calls) > 1 and _of_one_alone(error):
                if isinstance(error, FailedPrecondition):
                    self._apart_until_s = asyncio.get_running_loop().time() + APART_S
                await asyncio.gather(*(self._send_as_one([call]) for call in calls if not call.answer.done()))
            else:
                _fail(calls, error)
        except BaseException as error:
            # A channel that is closed cancels what is on its way.
            _fail(calls, error)
            raise


def parts(answer: pb.EmbedResponse, sizes: Sequence[int]) -> Iterator[pb.EmbedResponse]:
    """The answer cut into so many rows each, everything else as it is."""
    vectors, rows = answer.vectors, list(answer.rows)
    row_bytes, scale_bytes = (len(data) // max(1, vectors.rows) for data in (vectors.data, vectors.scales))
    for start, end in pairwise(accumulate(sizes, initial=0)):
        yield pb.EmbedResponse(
            vectors=pb.Matrix(
                data=vectors.data[start * row_bytes : end * row_bytes],
                dtype=vectors.dtype,
                rows=end - start,
                dim=vectors.dim,
                scales=vectors.scales[start * scale_bytes : end * scale_bytes],
            ),
            rows=rows[start:end],
            model=answer.model,
            space=answer.space,
            variant=answer.variant,
            timings=answer.timings,
        )


def _alike(waiting: Sequence[_Waiting], most: int) -> Iterator[list[_Waiting]]:
    """Those that may be sent as one, in the order in which they came."""
    #: Calls, their texts and characters, that go together so far.
    open_: dict[tuple[object, ...], tuple[list[_Waiting], int, int]] = {}
    for call in waiting:
        asked = call.request
        key = asked.model, asked.input_type, asked.dimensions, asked.dtype, asked.truncate, asked.traffic_key
        size, chars = len(asked.texts), _chars(asked)
        calls, all_size, all_chars = open_.get(key, ([], 0, 0))
        if calls and (all_size + size > most or all_chars + chars > MOST_CHARS):
            yield calls
            calls, all_size, all_chars = [], 0, 0
        calls.append(call)
        open_[key] = calls, all_size + size, all_chars + chars
    yield from (calls for calls, _, _ in open_.values())


def _chars(request: pb.EmbedRequest) -> int:
    return sum(map(len, request.texts))


def _sizes(calls: Sequence[_Waiting]) -> list[int]:
    return [len(call.request.texts) for call in calls]


def _of_one_alone(error: RingfortError) -> bool:
    """Whether it says what is wrong with one call, or that they do not go together."""
    too_much = isinstance(error, ResourceExhausted) and error.retry_after_ms is None
    return too_much or isinstance(error, InvalidArgument | FailedPrecondition)


def _end_if_all_left(
    task: asyncio.Task[None], calls: Sequence[_Waiting]
) -> Callable[[asyncio.Future[pb.EmbedResponse]], None]:
    def left(answer: asyncio.Future[pb.EmbedResponse]) -> None:
        if answer.cancelled() and all(call.answer.cancelled() for call in calls):
            task.cancel()

    return left


def _settle(call: _Waiting, answer: pb.EmbedResponse) -> None:
    if not call.answer.done():
        call.answer.set_result(answer)


def _fail(calls: Sequence[_Waiting], error: BaseException) -> None:
    for call in calls:
        if call.answer.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            call.answer.cancel()
        else:
            call.answer.set_exception(error)
