"""What may be served from a cache, from which tier, and when it no longer may."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from refusal import refused
from rpc import Rpc
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.results import SearchResult

MakeCollection = Callable[..., str]

TEXT = "a text to search for"


@pytest.fixture
def filled(client: Client, collection: str) -> str:
    """A collection of a few documents."""
    client.upsert(
        collection, [{"id": f"f{i}", "text": f"{TEXT} {i}", "attributes": {"rank": i}} for i in range(5)]
    )
    return collection


def ids(result: SearchResult) -> list[str]:
    return sorted(hit.id for hit in result)


def test_the_same_search_again_is_served_from_l1(client: Client, filled: str) -> None:
    first = client.search(filled, text=TEXT)
    again = client.search(filled, text=TEXT)
    assert (first.served_from, again.served_from) == ("INDEX", "L1")
    assert again.hits == first.hits
    assert (again.generation, again.space, again.variant, again.epoch, again.coverage) == (
        first.generation, first.space, first.variant, first.epoch, first.coverage,
    )  # fmt: skip
    assert first.timings.search_ms > 0
    assert again.timings.search_ms == 0


def test_another_question_has_another_answer(client: Client, filled: str) -> None:
    client.search(filled, text=TEXT)
    for options in (
        {"text": TEXT + "!"}, {"k": 3}, {"filter": "rank < 2"}, {"include": ["vector"]}, {"exact": True},
        {"effort": 1.0},
        {"recall": 0.9},
    ):  # fmt: skip
        assert client.search(filled, **{"text": TEXT, **options}).served_from == "INDEX", options


def test_a_vector_and_an_id_are_remembered_too(client: Client, filled: str) -> None:
    vector = client.embed([TEXT])[0]
    assert [client.search(filled, vector=vector).served_from for _ in range(2)] == ["INDEX", "L1"]
    assert [client.search(filled, id="f1").served_from for _ in range(2)] == ["INDEX", "L1"]


def test_an_answer_that_left_l1_comes_from_redis_and_is_back_in_l1(
    client: Client, make_collection: MakeCollection
) -> None:
    # 128 KiB of vectors an answer; L1 holds 4 MiB here.
    name = make_collection(dim=512)
    vectors = np.random.default_rng(2).normal(size=(64, 512)).astype(np.float32)
    client.upsert(name, [{"id": str(i), "vector": vector} for i, vector in enumerate(vectors)])

    def ask(i: int) -> SearchResult:
        return client.search(name, vector=vectors[i], k=64, include=["vector"])

    answers = [ask(i) for i in range(64)]
    assert {answer.served_from for answer in answers} == {"INDEX"}
    # The writes behind reach Redis in a moment; what has not is computed again.
    served = ask(0)
    for _ in range(20):
        if served.served_from == "REDIS":
            break
        for i in range(64):
            ask(i)
        served = ask(0)
    assert served.served_from == "REDIS"
    assert served.hits == answers[0].hits
    assert ask(0).served_from == "L1"


@pytest.mark.parametrize("change", ["upsert", "delete", "patch"])
def test_a_write_to_the_collection_ends_its_answers(client: Client, filled: str, change: str) -> None:
    assert [client.search(filled, text=TEXT, k=100).served_from for _ in range(2)] == ["INDEX", "L1"]
    before = client.search(filled, text=TEXT, k=100)
    match change:
        case "upsert":
            client.upsert(filled, [{"id": "unrelated", "text": "stocks and bonds"}])
        case "delete":
            client.delete(filled, ids=["f0"])
        case _:
            client.patch(filled, [{"id": "f0", "attributes": {"rank": 99}}])
    after = client.search(filled, text=TEXT, k=100)
    assert after.served_from == "INDEX"
    match change:
        case "upsert":
            assert ids(after) == sorted([*ids(before), "unrelated"])
        case "delete":
            assert ids(after) == [id for id in ids(before) if id != "f0"]
        case _:
            assert {hit.id: hit.attributes["rank"] for hit in after}["f0"] == 99
    again = client.search(filled, text=TEXT, k=100)
    assert (again.served_from, again.hits) == ("L1", after.hits)


def test_a_durable_write_ends_answers_too(client: Client, filled: str) -> None:
    for i in range(10):
        client.search(filled, text=TEXT, k=100)
        client.upsert(filled, [{"id": f"more{i}", "text": TEXT}], wait="DURABLE")
        assert client.search(filled, text=TEXT, k=100).served_from == "INDEX"


def test_many_writers_each_see_their_own_write_in_a_shared_answer(client: Client, collection: str) -> None:
    def write_and_look(writer: int) -> int:
        """How often the one question that everybody asks left out a write of this writer's."""
        missed = 0
        for i in range(12):
            client.upsert(collection, [{"id": f"w{writer}/{i}", "text": f"text {i % 3}"}])
            found = ids(client.search(collection, text=TEXT, k=1_000, include=["attributes"]))
            missed += not {f"w{writer}/{j}" for j in range(i + 1)} <= set(found)
        return missed

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write_and_look, range(8))) == 0
    assert len(client.search(collection, text=TEXT, k=1_000)) == 96


def test_a_refused_write_and_one_elsewhere_end_nothing(
    client: Client, filled: str, make_collection: MakeCollection
) -> None:
    client.search(filled, text=TEXT)
    client.upsert(filled, [{"id": "", "text": "no id"}])
    client.upsert(make_collection(), [{"id": "a", "text": TEXT}])
    assert client.search(filled, text=TEXT).served_from == "L1"


def test_staleness_that_is_allowed_serves_the_old_answer(client: Client, filled: str) -> None:
    old = client.search(filled, text=TEXT, k=100)
    client.upsert(filled, [{"id": "new", "text": TEXT}])
    stale = client.search(filled, text=TEXT, k=100, max_staleness_ms=600_000)
    assert (stale.served_from, stale.hits) == ("L1", old.hits)
    fresh = client.search(filled, text=TEXT, k=100)
    assert fresh.served_from == "INDEX"
    assert ids(fresh) == sorted([*ids(old), "new"])
    assert client.search(filled, text=TEXT, k=100, max_staleness_ms=600_000).hits == fresh.hits


def test_a_collection_can_allow_staleness_and_a_request_refuse_it(
    client: Client, make_collection: MakeCollection
) -> None:
    name = make_collection(max_staleness_ms=600_000)
    client.upsert(name, [{"id": "old", "text": TEXT}])
    assert ids(client.search(name, text=TEXT)) == ["old"]
    client.upsert(name, [{"id": "new", "text": TEXT}])
    assert ids(client.search(name, text=TEXT)) == ["old"]
    assert ids(client.search(name, text=TEXT, max_staleness_ms=0)) == ["new", "old"]


def test_a_read_token_beats_allowed_staleness(client: Client, filled: str) -> None:
    client.search(filled, text=TEXT, k=100)
    token = client.upsert(filled, [{"id": "new", "text": TEXT}]).token
    found = client.search(filled, text=TEXT, k=100, max_staleness_ms=600_000, read_after=token)
    assert "new" in ids(found)


def test_bypass_neither_reads_nor_fills(client: Client, filled: str) -> None:
    def served(*, cache: bool) -> str:
        return client.search(filled, text=TEXT, cache=cache).served_from

    assert [served(cache=False), served(cache=False)] == ["INDEX", "INDEX"]
    assert [served(cache=True), served(cache=True)] == ["INDEX", "L1"]
    assert served(cache=False) == "INDEX"
    bypassed = client.search(filled, text=TEXT, cache=False)
    assert bypassed.timings.inference_ms > 0
    assert bypassed.hits == client.search(filled, text=TEXT).hits


def test_each_row_of_a_batch_is_remembered_for_itself(client: Client, filled: str) -> None:
    first = client.batch_search(filled, texts=["one", "two"])
    assert (first.row_served_from, first.served_from) == (("INDEX", "INDEX"), "INDEX")
    mixed = client.batch_search(filled, texts=["three", "two", "one"])
    assert (mixed.row_served_from, mixed.served_from) == (("INDEX", "L1", "L1"), "INDEX")
    assert mixed.ids[1:] == first.ids[::-1]
    assert client.batch_search(filled, texts=["three", "one"]).served_from == "L1"
    client.delete(filled, ids=["f0"])
    assert client.batch_search(filled, texts=["three", "one"]).row_served_from == ("INDEX", "INDEX")


def test_a_recommendation_is_remembered_until_a_write(client: Client, filled: str) -> None:
    def ask() -> SearchResult:
        return client.recommend(filled, like=["f1"], rank={"rank": 0.5})

    first, again = ask(), ask()
    assert (first.served_from, again.served_from) == ("INDEX", "L1")
    assert again.hits == first.hits
    client.patch(filled, [{"id": "f2", "attributes": {"rank": 99}}])
    assert ask().served_from == "INDEX"


def test_the_cache_counts(client: Client, filled: str) -> None:
    def hits() -> int:
        (tier,) = [tier for tier in client.cache_stats().tiers if tier.name == "L1"]
        return tier.hits

    client.search(filled, text=TEXT)
    before = hits()
    client.search(filled, text=TEXT)
    assert hits() > before
    superseded = client.cache_stats().superseded
    client.delete(filled, ids=["f0"])
    client.search(filled, text=TEXT)
    assert client.cache_stats().superseded > superseded


def test_hot_keys_tell_what_is_asked_for_and_not_what_it_says(rpc: Rpc, client: Client, filled: str) -> None:
    for _ in range(40):
        client.search(filled, text=TEXT)

    def asked() -> list[pb.HotKey]:
        told = rpc.cluster.HotKeys(pb.HotKeysRequest(limit=1_000)).keys
        return [key for key in told if key.collection == filled and key.count >= 39]

    # What another gateway was asked is told every two seconds.
    (answer,) = eventually(asked)
    told = rpc.cluster.HotKeys(pb.HotKeysRequest(limit=1_000)).keys
    assert (answer.kind, len(answer.key)) == ("answer", 32)
    assert 0 < answer.share <= 1
    assert [key.count for key in told] == sorted((key.count for key in told), reverse=True)
    assert any(key.kind == "embedding" for key in told)
    assert len(rpc.cluster.HotKeys(pb.HotKeysRequest(limit=1)).keys) == 1


def test_hot_answers_are_warmed_after_a_write(rpc: Rpc, client: Client, filled: str) -> None:
    def hot() -> bool:
        for _ in range(200):
            client.search(filled, text=TEXT)
        return client.warm_cache(filled).known > 0

    # Which keys are hot is looked at every two seconds.
    assert any(hot() for _ in range(100))
    client.upsert(filled, [{"id": "new", "text": TEXT}])
    assert client.search(filled, text="another text").served_from == "INDEX"
    warmed = client.warm_cache(filled)
    assert (warmed.computed, warmed.failed, warmed.left) == (1, 0, 0)
    found = client.search(filled, text=TEXT)
    assert (found.served_from, "new" in ids(found)) == ("L1", True)
    assert client.warm_cache(filled).computed == 0


def test_warming_has_bounds(rpc: Rpc, collection: str) -> None:
    for request, named in (
        (pb.WarmCacheRequest(collection=collection, rate=1_001), "rate"),
        (pb.WarmCacheRequest(collection=collection, rate=-1), "rate"),
        (pb.WarmCacheRequest(collection=collection, rate=float("nan")), "rate"),
        (pb.WarmCacheRequest(collection="none"), "collection"),
    ):
        assert refused(lambda request=request: rpc.cluster.WarmCache(request)).field == named
