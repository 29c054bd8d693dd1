"""Calls of embed made together travel as one, and each is answered, refused and left for itself."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from client_fakes import FakeService, abort
from hypothesis import given
from hypothesis import strategies as st

from protos.ringfort import v1 as pb
from ringfort import AsyncClient
from ringfort.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, RingfortError, Unavailable
from ringfort.together import APART_S, parts

EMBED = "EmbeddingService/Embed"
MOST = 4


def answer(request: pb.EmbedRequest, _: Any = None) -> pb.EmbedResponse:
    """Each vector tells its text's length twice."""
    vectors = np.array([[len(text), len(text)] for text in request.texts], np.float32)
    matrix = pb.Matrix(data=vectors.tobytes(), dtype=pb.F32, rows=len(vectors), dim=2)
    return pb.EmbedResponse(vectors=matrix, rows=[pb.EmbedRow(tokens=len(text)) for text in request.texts])


def refusing(bad: Callable[[pb.EmbedRequest], bool], **refusal: Any) -> Callable[..., Any]:
    """Answers, and aborts whatever is bad."""

    def embed(request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        if bad(request):
            abort(context, **refusal)
        return answer(request)

    return embed


def sizes(fake: FakeService) -> list[int]:
    return [len(request.texts) for request in fake.requests]


async def test_calls_of_one_turn_are_sent_as_one_and_each_has_its_own_vectors(fake: FakeService) -> None:
    fake.answers[EMBED] = answer
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        texts = ["a" * (n + 1) for n in range(9)]
        found = await asyncio.gather(*(client.embed([text]) for text in texts))
        assert [row.tolist() for (row,) in found] == [[n + 1, n + 1] for n in range(9)]
        assert sorted(sizes(fake)) == [1, 4, 4]
        pair, alone = await asyncio.gather(client.embed(["xx", "y"]), client.embed(["zzz"]))
        assert (pair[:, 0].tolist(), alone[:, 0].tolist()) == ([2, 1], [3])
        assert sizes(fake)[3:] == [3]


async def test_calls_that_ask_for_something_else_or_for_much_go_alone(fake: FakeService) -> None:
    fake.answers[EMBED] = answer
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        await asyncio.gather(
            client.embed(["a"]),
            client.embed(["b"], input_type="DOCUMENT"),
            client.embed(["c"], model="other"),
            client.embed(["d"], dtype="F16", dimensions=2, truncate=True, traffic_key="u"),
            client.embed(["e"]),
            client.embed(list("fghij")),
        )
        await client.embed(["k"])
        await client.embed(["l"])
    assert sorted("".join(request.texts) for request in fake.requests) == [
        "ae", "b", "c", "d", "fghij", "k", "l",
    ]  # fmt: skip
    asked = {"".join(request.texts): request for request in fake.requests}
    assert asked["b"].input_type == pb.DOCUMENT
    assert asked["c"].model == "other"
    assert (asked["d"].dtype, asked["d"].dimensions, asked["d"].truncate) == (pb.F16, 2, True)
    assert asked["d"].traffic_key == "u"


async def test_by_default_short_texts_go_together_and_may_be_sent_apart(fake: FakeService) -> None:
    fake.answers[EMBED] = answer
    async with AsyncClient(fake.address) as client:
        await asyncio.gather(*(client.embed(["a"]) for _ in range(40)))
        await asyncio.gather(*(client.embed(["long " * 100]) for _ in range(5)), client.embed(["x" * 3_000]))
    assert sorted(sizes(fake)) == [1, 1, 4, 8, 32]
    assert {len(request.texts) > 1: request.together for request in fake.requests} == {
        True: True,
        False: False,
    }
    fake.requests.clear()
    async with AsyncClient(fake.address, embed_together=1) as client:
        await asyncio.gather(*(client.embed(["a"]) for _ in range(5)))
    assert sizes(fake) == [1] * 5


async def test_the_first_of_a_turn_may_leave_before_it_is_over(fake: FakeService) -> None:
    fake.answers[EMBED] = answer
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        first, *others = (asyncio.create_task(client.embed([text])) for text in ("a", "bb", "ccc"))
        asyncio.get_running_loop().call_soon(first.cancel)
        assert [found.tolist() for found in await asyncio.gather(*others)] == [[[2, 2]], [[3, 3]]]
        assert first.cancelled()
    assert sizes(fake) == [2]


async def test_callers_who_would_meet_different_versions_are_sent_apart_for_a_while(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answers[EMBED] = refusing(
        lambda request: request.together, code=grpc.StatusCode.FAILED_PRECONDITION, message="together: no"
    )
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        for expected in ([3, 1, 1, 1], [1, 1, 1]):
            fake.requests.clear()
            found = await asyncio.gather(*(client.embed([text]) for text in ("a", "bb", "ccc")))
            assert [row.tolist() for (row,) in found] == [[1, 1], [2, 2], [3, 3]]
            assert sizes(fake) == expected
        later_s = asyncio.get_running_loop().time() + APART_S
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: later_s, raising=False)
        fake.answers[EMBED] = answer
        fake.requests.clear()
        await asyncio.gather(*(client.embed([text]) for text in ("a", "bb")))
        assert sizes(fake) == [2]


@pytest.mark.parametrize("error", [InvalidArgument, ResourceExhausted])
async def test_what_is_wrong_with_one_is_told_to_that_one_alone(
    fake: FakeService, error: type[RingfortError]
) -> None:
    fake.answers[EMBED] = refusing(
        lambda request: "bad" in request.texts, code=error.code, message="texts[0]: no", field="texts[0]"
    )
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        found = await asyncio.gather(
            *(client.embed([text]) for text in ("a", "bad", "cc")), return_exceptions=True
        )
    first, refused, last = found
    assert isinstance(refused, error)
    assert refused.field == "texts[0]"
    assert isinstance(first, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert (first.tolist(), last.tolist()) == ([[1, 1]], [[2, 2]])
    assert sorted(sizes(fake)) == [1, 1, 1, 3]


async def test_a_service_that_has_too_much_to_do_is_not_asked_again(fake: FakeService) -> None:
    fake.answers[EMBED] = refusing(
        lambda request: True, code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="full", retry_after_ms=70
    )
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        found = await asyncio.gather(*(client.embed(["a"]) for _ in range(3)), return_exceptions=True)
    assert [each.retry_after_ms for each in found if isinstance(each, ResourceExhausted)] == [70] * 3
    assert sizes(fake) == [3]


async def test_who_leaves_does_not_take_the_others_along_and_the_last_ends_the_call(
    fake: FakeService,
) -> None:
    arrived, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def held(request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        context.add_callback(ended.set)
        arrived.set()
        go_on.wait(10)
        return answer(request)

    fake.answers[EMBED] = held
    async with AsyncClient(fake.address, embed_together=MOST) as client:
        stays, leaves = (asyncio.create_task(client.embed([text])) for text in ("a", "bb"))
        await asyncio.to_thread(arrived.wait, 10)
        leaves.cancel()
        await asyncio.sleep(0.05)
        assert not ended.is_set()
        go_on.set()
        assert (await stays).tolist() == [[1, 1]]
        assert leaves.cancelled()

        for event in (arrived, go_on, ended):
            event.clear()
        both = [asyncio.create_task(client.embed([text])) for text in ("a", "bb")]
        await asyncio.to_thread(arrived.wait, 10)
        for one in both:
            one.cancel()
        assert await asyncio.to_thread(ended.wait, 10)
        go_on.set()


async def test_they_end_within_the_deadline_and_with_the_client(fake: FakeService) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def held(request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        arrived.set()
        go_on.wait(10)
        return answer(request)

    fake.answers[EMBED] = held
    try:
        async with AsyncClient(fake.address, embed_together=MOST, timeout_s=0.2) as client:
            found = await asyncio.gather(*(client.embed(["a"]) for _ in range(2)), return_exceptions=True)
            assert [type(each) for each in found] == [DeadlineExceeded] * 2
        client = AsyncClient(fake.address, embed_together=MOST, timeout_s=20)
        arrived.clear()
        calls = [asyncio.create_task(client.embed(["a"])) for _ in range(2)]
        await asyncio.to_thread(arrived.wait, 10)
        await client.close()
        for each in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(each, asyncio.CancelledError | Unavailable)
    finally:
        go_on.set()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([pb.F32, pb.F16, pb.I8]))
def test_the_parts_of_an_answer_are_the_answer(counts: list[int], dtype: "pb.DType") -> None:
    rows, dim = sum(counts), 3
    width = {pb.F32: 4, pb.F16: 2, pb.I8: 1}[dtype]
    whole = pb.EmbedResponse(
        vectors=pb.Matrix(
            data=np.arange(rows * dim * width, dtype=np.uint8).tobytes(),
            dtype=dtype, rows=rows, dim=dim,
            scales=np.arange(rows, dtype=np.float32).tobytes() if dtype == pb.I8 else b"",
        ),
        rows=[pb.EmbedRow(tokens=n) for n in range(rows)],
        model="m", space="s", variant="v", timings=pb.Timings(total_ms=3),
    )  # fmt: skip
    cut = list(parts(whole, counts))
    assert [each.vectors.rows for each in cut] == [len(each.rows) for each in cut] == counts
    assert b"".join(each.vectors.data for each in cut) == whole.vectors.data
    assert b"".join(each.vectors.scales for each in cut) == whole.vectors.scales
    assert [row for each in cut for row in each.rows] == list(whole.rows)
    for each in cut:
        assert (each.model, each.space, each.variant, each.timings) == ("m", "s", "v", whole.timings)
        assert (each.vectors.dtype, each.vectors.dim) == (dtype, dim)
