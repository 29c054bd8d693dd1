"""Read tokens: a read that carries one sees that write, and no token of elsewhere is believed."""

from collections.abc import Callable

import grpc
import pytest
from refusal import refused
from rpc import Rpc

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.documents import WriteToken
from ringfort.errors import FailedPrecondition


def test_a_durable_write_is_seen_by_a_read_with_its_token(client: Client, collection: str) -> None:
    for i in range(30):
        token = client.upsert(collection, [{"id": f"t{i}", "text": f"text {i}"}], wait="DURABLE").token
        found = client.search(collection, text=f"text {i}", k=100, read_after=token)
        assert f"t{i}" in {hit.id for hit in found}
        assert len(found) == i + 1


def test_every_read_takes_a_token(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "seed", "text": "seed"}])
    token = client.upsert(collection, [{"id": "a", "text": "text"}], wait="DURABLE").token
    assert "a" in client.batch_search(collection, texts=["text"], read_after=token).ids[0]
    token = client.delete(collection, ids=["a"], wait="DURABLE").token
    recommended = client.recommend(collection, like=["seed"], read_after=token)
    assert [hit.id for hit in recommended] == []


def test_tokens_add_up(client: Client, collection: str) -> None:
    tokens = [
        client.upsert(collection, [{"id": f"t{i}", "text": "text"}], wait="DURABLE").token for i in range(5)
    ]
    together = WriteToken()
    for token in tokens:
        together |= token
    assert all(together | token == together for token in tokens)
    assert tokens[-1].positions.items() <= together.positions.items()
    assert len(client.search(collection, text="text", read_after=together)) == 5


READS: dict[str, Callable[[Rpc, str, pb.WriteToken], object]] = {
    "Search": lambda rpc, name, token: rpc.search.Search(
        pb.SearchRequest(collection=name, text="text", read_after=token)
    ),
    "BatchSearch": lambda rpc, name, token: rpc.search.BatchSearch(
        pb.BatchSearchRequest(collection=name, texts=pb.TextList(values=["text"]), read_after=token)
    ),
    "Recommend": lambda rpc, name, token: rpc.search.Recommend(
        pb.RecommendRequest(collection=name, like=[pb.Example(id="a")], read_after=token)
    ),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("token", ["of another log", "beyond the counter"])
def test_a_token_nobody_gave_out_is_refused(
    rpc: Rpc, client: Client, collection: str, read: str, token: str
) -> None:
    positions = client.upsert(collection, [{"id": "a", "text": "text"}]).token.positions
    ((log, position),) = positions.items()
    forged = {"no-such-log": 1} if token == "of another log" else {log: position + 1}
    refusal = refused(lambda: READS[read](rpc, collection, pb.WriteToken(positions=forged)))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (refusal.field, refusal.reason) == ("read_after", "UNKNOWN_LOG")
    READS[read](rpc, collection, pb.WriteToken(positions=positions))


def test_a_forged_token_is_refused_though_the_answer_is_remembered(client: Client, collection: str) -> None:
    client.upsert(collection, [{"id": "a", "text": "text"}])
    assert [client.search(collection, text="text").served_from for _ in range(2)] == ["INDEX", "L1"]
    with pytest.raises(FailedPrecondition):
        client.search(collection, text="text", read_after=WriteToken({"no-such-log": 1}))
