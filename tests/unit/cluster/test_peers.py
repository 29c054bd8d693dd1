"""Internal ports: who may ask, how errors arrive, and what becomes of calls to a process that goes."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import embedder_node_pb2
from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeStub
from services import status
from services.deadline import Deadline
from services.peers import Peer, Port
from shard_router import errors

SERVICE = embedder_node_pb2.DESCRIPTOR.services_by_name["EmbedderNode"]
EXAMPLES: list[errors.RingfortError] = [
    errors.StaleEpoch(seen=7, current=9),
    errors.Overloaded("a queue", 5, retry_after_ms=70),
    errors.InvalidField("texts[3]", "not Unicode text"),
    errors.DimensionMismatch("query", 2, 3),
    errors.DeadlineExceeded("a stage"),
    errors.Unavailable("away"),
    errors.LogPurged("log-1", 3, 9),
    errors.NotFound("collection", "things"),
]


class Failing:
    """Fails every call with what it is told to, or lets it wait."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.entered = asyncio.Event()
        self.deadline: Deadline | None = None

    async def Embed(self, request: internal.EmbedRequest, deadline: Deadline) -> internal.EmbedResponse:
        self.deadline = deadline
        self.entered.set()
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()
        raise AssertionError

    async def Describe(
        self, request: internal.DescribeRequest, deadline: Deadline
    ) -> internal.DescribeResponse:
        return internal.DescribeResponse(manifest=b"here")

    EmbedImages = Embed


@pytest.fixture
def servicer() -> Failing:
    return Failing()


@pytest.fixture
async def port(servicer: Failing) -> AsyncIterator[Port]:
    port = Port({SERVICE: servicer}, "secret")
    yield port
    await port.stop(0)


@pytest.fixture
async def peer() -> AsyncIterator["Peer[EmbedderNodeStub]"]:
    peer = Peer("node", EmbedderNodeStub, "secret")
    yield peer
    await peer.close()


async def embed(peer: "Peer[EmbedderNodeStub]", timeout_s: float = 20.0) -> None:
    with peer.calling() as stub:
        await stub.Embed(internal.EmbedRequest(), timeout=timeout_s, metadata=peer.metadata)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
async def test_an_error_arrives_as_it_was_raised(
    port: Port, peer: "Peer[EmbedderNodeStub]", servicer: Failing, error: errors.RingfortError
) -> None:
    servicer.error = error
    peer.move(await port.start())
    with pytest.raises(type(error)) as raised:
        await embed(peer)
    assert type(raised.value) is type(error)
    assert str(raised.value) == str(error)
    assert vars(raised.value) == vars(error)
    assert (raised.value.field, raised.value.retry_after_ms) == (error.field, error.retry_after_ms)
    assert status.code_of(raised.value) is status.code_of(error)


async def test_a_defect_of_the_other_side_is_internal(
    port: Port, peer: "Peer[EmbedderNodeStub]", servicer: Failing
) -> None:
    servicer.error = KeyError("lost")
    peer.move(await port.start())
    with pytest.raises(errors.RingfortError, match="node failed: INTERNAL: KeyError: 'lost'"):
        await embed(peer)


async def test_only_who_has_the_token_is_answered(port: Port) -> None:
    address = await port.start()
    for token in ("", "Secret", "secret2"):
        stranger = Peer("node", EmbedderNodeStub, token)
        stranger.move(address)
        with pytest.raises(errors.Unauthenticated):
            await embed(stranger)
        await stranger.close()


async def test_the_deadline_is_passed_down(
    port: Port, peer: "Peer[EmbedderNodeStub]", servicer: Failing
) -> None:
    peer.move(await port.start())
    with pytest.raises(errors.DeadlineExceeded):
        await embed(peer, timeout_s=0.2)
    assert servicer.deadline is not None
    assert servicer.deadline.left_s() <= 0.2


async def test_who_is_away_is_unavailable_at_once_and_back_where_it_moves(
    port: Port, peer: "Peer[EmbedderNodeStub]", servicer: Failing, free_port: int
) -> None:
    with pytest.raises(errors.Unavailable, match="node is away"):
        await embed(peer)
    moved = peer.moved
    peer.move(f"127.0.0.1:{free_port}")
    assert moved.is_set()
    with pytest.raises(errors.Unavailable, match="node is away"):
        await embed(peer)
    peer.move(await port.start())
    with peer.calling() as stub:
        told = await stub.Describe(internal.DescribeRequest(), timeout=20, metadata=peer.metadata)
    assert told.manifest == b"here"


async def test_a_server_that_ends_fails_its_calls(
    port: Port, peer: "Peer[EmbedderNodeStub]", servicer: Failing
) -> None:
    peer.move(await port.start())
    calling = asyncio.create_task(embed(peer))
    await servicer.entered.wait()
    await port.stop(0)
    with pytest.raises(errors.Unavailable):
        await calling


async def test_giving_a_connection_up_fails_its_calls_but_cancels_no_caller(
    port: Port, servicer: Failing
) -> None:
    peer = Peer("node", EmbedderNodeStub, "secret")
    peer.move(await port.start())
    calling = asyncio.create_task(embed(peer))
    await servicer.entered.wait()
    await peer.close()
    with pytest.raises(errors.Unavailable):
        await calling
