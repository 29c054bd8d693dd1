"""A collection gets another model or index while it is written and searched, and goes back."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import pytest
from model_files import DEFAULT, made_model
from refusal import refused
from rpc import Rpc
from up import Up
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.errors import FailedPrecondition, InvalidArgument, NotFound

WORDS = ("apple", "stone", "river", "copper", "cloud", "violin", "ladder", "engine", "pepper", "harbour")


@pytest.fixture(scope="module")
def other_model(client: Client, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registered model of another space: it reads everything as a question about fish."""
    name = f"m-{uuid4().hex[:8]}"
    told = {"query": "fish ", "document": "fish "}
    directory = made_model(
        model_dir, tmp_path_factory.mktemp("other") / name, name=name, space=uuid4().hex[:16], prompts=told
    )
    client.register_model(str(directory))
    return f"{name}@1"


def texts(count: int, seed: int = 0) -> dict[str, str]:
    rng = random.Random(seed)
    return {f"d{i}": " ".join(rng.choices(WORDS, k=6)) for i in range(count)}


def upsert(client: Client, collection: str, told: dict[str, str]) -> None:
    result = client.upsert(collection, [{"id": id, "text": text} for id, text in told.items()])
    assert result.visible
    assert not result.failures


def built(client: Client, collection: str, **wanted: str) -> pb.Job:
    """A job that has built another generation."""
    job = client.reindex(collection, **wanted)
    eventually(lambda: client.job(job.id).state != pb.Job.RUNNING, within_s=60)
    job = client.job(job.id)
    assert (job.state, job.kind) == (pb.Job.SUCCEEDED, "reindex"), job.message
    return job


def everything(client: Client, collection: str) -> dict[str, str]:
    """What an exact search finds of a collection, all of it."""
    found = client.search(collection, text="apple", k=1_000, exact=True, cache=False)
    assert found.coverage.complete
    return {hit.id: hit.text for hit in found}


def vectors(client: Client, collection: str, *ids: str) -> np.ndarray:
    return np.stack(
        [d.vector for d in client.get(collection, list(ids), include=["vector"]) if d is not None]
    )


def test_another_model_takes_over_and_gives_back(
    client: Client, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    told = texts(120)
    upsert(client, collection, told)
    before = client.search(collection, text="apple river", k=5)
    job = built(client, collection, model=other_model)
    assert job.generation == 2
    assert 0.0 <= job.figures["overlap_at_10"] <= 1.0
    assert job.figures["questions"] == 64
    beside = {each.name: each.beside for each in client.cluster().collections}[collection]
    assert (beside.number, beside.model, beside.behind) == (2, other_model, 0)
    still = client.search(collection, text="apple river", k=5)
    assert [hit.id for hit in still] == [hit.id for hit in before]
    assert (still.generation, still.space) == (1, before.space)

    upsert(client, collection, {"late": "apple in the harbour"})
    told["late"] = "apple in the harbour"
    live = client.activate(collection, 2)
    assert live.generation == 2
    after = client.search(collection, text="apple river", k=5)
    assert (after.generation, after.space) == (2, live.space)
    assert after.space != before.space
    assert everything(client, collection) == told
    as_told = client.embed([told["d0"], told["late"]], model=other_model, input_type="DOCUMENT")
    assert np.allclose(vectors(client, collection, "d0", "late"), as_told, atol=1e-6)

    upsert(client, collection, {"d1": "violin violin", "new": "a new ladder"})
    client.delete(collection, ids=["d2"], wait="VISIBLE")
    told |= {"d1": "violin violin", "new": "a new ladder"}
    del told["d2"]
    assert everything(client, collection) == told
    assert client.rollback(collection).generation == 1
    back = client.search(collection, text="apple river", k=5)
    assert (back.generation, back.space) == (1, before.space)
    assert everything(client, collection) == told
    as_told = client.embed([told["d1"], told["new"]], model=DEFAULT, input_type="DOCUMENT")
    assert np.allclose(vectors(client, collection, "d1", "new"), as_told, atol=1e-6)
    with pytest.raises(FailedPrecondition, match="keeps no generation"):
        client.rollback(collection)
    assert client.activate(collection, 0).generation == 2, "it is complete still"
    assert everything(client, collection) == told


def test_vectors_get_another_index(client: Client, make_collection: Callable[..., str]) -> None:
    collection = make_collection(dim=16)
    rng = np.random.default_rng(3)
    stored = rng.standard_normal((6_000, 16), np.float32)
    client.upsert(collection, [{"id": f"v{i}", "vector": v} for i, v in enumerate(stored)])
    queries = rng.standard_normal((20, 16), np.float32)
    before = client.batch_search(collection, vectors=queries, k=10, exact=True)
    job = built(client, collection, index="hnsw")
    assert job.figures["overlap_at_10"] >= 0.9
    client.activate(collection, job.generation)
    after = client.batch_search(collection, vectors=queries, k=10, exact=True)
    assert [list(row) for row in after.ids] == [list(row) for row in before.ids]
    assert np.allclose(after.scores, before.scores, atol=1e-5)

    def kinds() -> set[str]:
        (status,) = [each for each in client.cluster().collections if each.name == collection]
        return {segment.kind for replica in status.replicas for segment in replica.segment_status}

    eventually(lambda: kinds() == {"hnsw"})
    told = {each.name: each for each in client.collections()}[collection]
    assert (told.index, told.generation) == ("hnsw", 2)


@contextmanager
def written(client: Client, service: Up, collection: str, told: dict[str, str]) -> Iterator[list[str]]:
    """Somebody upserts, patches and deletes all the while and looks at once for what was acknowledged.

    What went wrong is told in the list; `told` is what the collection holds.
    """
    wrong: list[str] = []
    ended = threading.Event()

    def write(seed: int) -> None:
        rng, count = random.Random(seed), 0
        with Client(service.grpc) as own:
            while not ended.is_set():
                count += 1
                id = f"w{seed}-{rng.randrange(12)}"
                try:
                    if id in told and rng.random() < 0.3:
                        own.delete(collection, ids=[id], wait="VISIBLE")
                        del told[id]
                    else:
                        text = " ".join(rng.choices(WORDS, k=5))
                        result = own.upsert(collection, [{"id": id, "text": text}])
                        if result.failures or not result.visible:
                            wrong.append(f"{id}: {result.failures or 'not visible'}")
                            continue
                        told[id] = text
                    hits = own.search(
                        collection, text=told.get(id, "apple"), k=1_000, exact=True, cache=False
                    )
                    seen = {hit.id: hit.text for hit in hits}
                    if seen.get(id) != told.get(id) or not hits.coverage.complete:
                        wrong.append(f"{id}: {seen.get(id)!r} where it is {told.get(id)!r}, {hits.coverage}")
                except Exception as error:
                    wrong.append(f"{id}: {type(error).__name__} {error}")

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_nothing_is_lost_or_late_while_generations_change(
    client: Client, service: Up, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    told = texts(100, seed=1)
    upsert(client, collection, told)
    with written(client, service, collection, told) as wrong:
        for _ in range(2):
            job = built(client, collection, model=other_model)
            assert client.activate(collection, job.generation).generation == job.generation
            assert client.rollback(collection).generation < job.generation
    assert wrong == []
    assert everything(client, collection) == told
    assert client.activate(collection, 0).generation == 3
    assert everything(client, collection) == told
    assert client.count(collection) == len(told)


def test_streams_keep_their_order(
    client: Client, rpc: Rpc, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    upsert(client, collection, texts(20))
    job = built(client, collection, model=other_model)
    activated = threading.Event()

    def batches() -> Iterator[pb.UpsertRequest]:
        count = 0
        while count < 100 or not activated.is_set():
            count += 1
            document = pb.Document(id="again", text=f"{WORDS[count % 10]} {count}")
            yield pb.UpsertRequest(collection=collection, documents=[document])

    def activate() -> None:
        client.activate(collection, job.generation)
        activated.set()

    thread = threading.Thread(target=activate)
    seqs = []
    for answer in rpc.document.UpsertStream(batches()):
        if not seqs:
            thread.start()
        assert answer.statuses[0].code == 0, answer.statuses[0]
        seqs.append(answer.statuses[0].version.seq)
    thread.join()
    assert seqs == sorted(seqs)
    (last,) = client.get(collection, ["again"])
    assert last is not None
    assert last.text.endswith(f" {len(seqs)}")


def test_hot_questions_are_answered_beforehand(
    client: Client, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    upsert(client, collection, texts(50))
    job = built(client, collection, model=other_model)

    def hot() -> bool:
        for _ in range(200):
            client.search(collection, text="copper cloud", k=3)
        return client.warm_cache(collection).known > 0

    # Which keys are hot is looked at every two seconds.
    assert any(hot() for _ in range(100))
    client.activate(collection, job.generation)
    first = client.search(collection, text="copper cloud", k=3)
    assert first.generation == 2
    assert first.served_from in ("L1", "REDIS")
    assert [hit.id for hit in first] == [
        hit.id for hit in client.search(collection, text="copper cloud", k=3, cache=False)
    ]


def test_what_cannot_be_done_is_refused(
    client: Client, rpc: Rpc, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    upsert(client, collection, {"a": "apple"})
    client.upsert(collection, [{"id": "bare", "vector": np.ones(384, np.float32)}])
    with pytest.raises(FailedPrecondition, match=r"1 documents .* came as bare vectors"):
        client.reindex(collection, model=other_model)
    with pytest.raises(NotFound, match="nothing@1"):
        client.reindex(collection, model="nothing@1")
    with pytest.raises(InvalidArgument, match=r"index.kind"):
        client.reindex(collection, index="trie")
    with pytest.raises(NotFound, match="generation"):
        client.activate(collection, 0)
    with pytest.raises(FailedPrecondition, match="keeps no generation"):
        client.rollback(collection)
    with pytest.raises(FailedPrecondition, match="no model"):
        client.reindex(make_collection(dim=4), model=other_model)
    job = built(client, collection, index="flat")
    with pytest.raises(NotFound, match="generation"):
        client.activate(collection, job.generation + 7)
    assert client.activate(collection, 1).generation == 1, "it is the live one"
    again = built(client, collection, index="auto")
    assert again.generation == job.generation + 1
    with pytest.raises(NotFound):
        client.activate(collection, job.generation)
    client.delete_collection(collection)
    refusal = refused(lambda: rpc.index.GetJob(pb.GetJobRequest(id=again.id)))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


def test_bare_vectors_of_the_former_space_are_refused(
    client: Client, make_collection: Callable[..., str], other_model: str
) -> None:
    """Whoever brings vectors while another space takes over is told so, not mixed in."""
    collection = make_collection()
    upsert(client, collection, texts(30))
    job = built(client, collection, model=other_model)
    ended, outcomes = threading.Event(), []

    def bring() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            vector = np.ones(384, np.float32)
            result = client.upsert(collection, [{"id": f"b{count}", "text": "copper", "vector": vector}])
            outcomes.append(result)

    thread = threading.Thread(target=bring)
    thread.start()
    client.activate(collection, job.generation)
    ended.set()
    thread.join()
    assert outcomes
    assert client.search(collection, text="copper").generation == 2


def test_a_job_that_is_cancelled_leaves_nothing(
    client: Client, make_collection: Callable[..., str], other_model: str
) -> None:
    collection = make_collection()
    upsert(client, collection, texts(900))
    job = client.reindex(collection, model=other_model)
    with pytest.raises(FailedPrecondition, match="another job"):
        client.reindex(collection, model=other_model)
    cancelled = client.cancel_job(job.id)
    assert cancelled.state == pb.Job.CANCELLED
    (status,) = [each for each in client.cluster().collections if each.name == collection]
    assert not status.HasField("beside")
    with pytest.raises(NotFound):
        client.activate(collection, 0)
    assert built(client, collection, index="flat").generation == job.generation + 1


def test_from_the_command_line(
    service: Up, client: Client, make_collection: Callable[..., str], other_model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from ringfort.cli import main

    collection = make_collection()
    upsert(client, collection, texts(40))

    def run(*args: str) -> str:
        assert main([*args, "--server", service.grpc]) == 0
        return capsys.readouterr().out

    told = run("reindex", collection, "--model", other_model)
    assert "succeeded" in told
    assert "overlap at 10" in told
    assert f"generation 2 beside {collection}" in run("cluster", "describe")
    assert f"generation 2 of {collection} is live" in run("activate", collection)
    assert f"generation 1 of {collection} is live" in run("rollback", collection)
    assert main(["rollback", collection, "--server", service.grpc]) == 1
