"""Processes join, are told what changes, and are gone when their call to the head ends."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import head_pb2
from services.deadline import Deadline
from services.membership import Head, Membership
from services.peers import Port
from shard_router.errors import Unavailable

SERVICE = head_pb2.DESCRIPTOR.services_by_name["Head"]


class Database:
    """What the head knows of its claim."""

    log_id = "log-1"

    def claim(self) -> internal.Claim:
        return internal.Claim(id=b"0" * 16, log_id=self.log_id, term=1)


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def head(database: Database) -> Head:
    return Head(database.claim)


@pytest.fixture
async def address(head: Head) -> AsyncIterator[str]:
    port = Port({SERVICE: head}, "token")
    yield await port.start()
    await port.stop(0)


def member(name: str, address: str = "127.0.0.1:1") -> internal.Member:
    return internal.Member(kind="shard", name=name, address=address)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_who_joins_is_heard_of_until_it_leaves(head: Head, address: str) -> None:
    heard: list[tuple[str, str, bool]] = []
    head.listen(lambda member, here: heard.append((member.name, member.address, here)))
    words: list[internal.Word] = []
    one = Membership(address, "token", member("one"), words.append)
    await one.joined(Deadline.after(20))
    two = Membership(address, "token", member("two", "127.0.0.1:2"), lambda _: None)
    await head.wait_for(lambda: len(head.members("shard")) == 2, Deadline.after(20), "two")
    await until(lambda: len(words[-1].members) == 2)
    late: list[tuple[str, bool]] = []
    head.listen(lambda member, here: late.append((member.name, here)))
    assert late == [("one", True), ("two", True)]
    await two.close()
    await until(lambda: len(words[-1].members) == 1)
    await one.close()
    await until(lambda: not head.members("shard"))
    assert heard == [
        ("one", "127.0.0.1:1", True), ("two", "127.0.0.1:2", True),
        ("two", "127.0.0.1:2", False), ("one", "127.0.0.1:1", False),
    ]  # fmt: skip


async def test_another_under_the_same_name_takes_its_place(head: Head, address: str) -> None:
    heard: list[tuple[str, bool]] = []
    head.listen(lambda member, here: heard.append((member.address, here)))
    former = Membership(address, "token", member("one", "127.0.0.1:1"), lambda _: None)
    await former.joined(Deadline.after(20))
    latter = Membership(address, "token", member("one", "127.0.0.1:2"), lambda _: None)
    await latter.joined(Deadline.after(20))
    await former.close()
    # The former's end is not taken for the latter's.
    await latter.close()
    await until(lambda: not head.members("shard"))
    assert heard == [
        ("127.0.0.1:1", True), ("127.0.0.1:1", False), ("127.0.0.1:2", True), ("127.0.0.1:2", False),
    ]  # fmt: skip


async def test_a_change_of_claim_is_told(head: Head, address: str, database: Database) -> None:
    words: list[internal.Word] = []
    one = Membership(address, "token", member("one"), words.append)
    await one.joined(Deadline.after(20))
    database.log_id = "log-2"
    await until(lambda: words[-1].claim.log_id == "log-2")
    await one.close()


async def test_a_head_that_was_away_is_joined_again(database: Database) -> None:
    first, port = Head(database.claim), None
    port = Port({SERVICE: first}, "token")
    address = await port.start()
    one = Membership(address, "token", member("one"), lambda _: None)
    await one.joined(Deadline.after(20))
    await port.stop(0)
    second = Head(database.claim)
    again = Port({SERVICE: second}, "token")
    await again.start(address)
    await second.wait_for(lambda: bool(second.members("shard")), Deadline.after(20), "one")
    await one.close()
    await again.stop(0)


async def test_a_member_that_does_not_come_is_unavailable(head: Head, free_port: int) -> None:
    with pytest.raises(Unavailable, match="nobody did not join"):
        await head.wait_for(lambda: False, Deadline.after(0.05), "nobody")
    lost = Membership(f"127.0.0.1:{free_port}", "token", member("one"), lambda _: None)
    with pytest.raises(Unavailable, match="cannot be joined"):
        await lost.joined(Deadline.after(0.2))
    await lost.close()
