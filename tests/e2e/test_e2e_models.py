"""A model is registered whole or not at all, used by name, promoted and rolled back."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import grpc
import httpx
import numpy as np
import pytest
from model_files import DEFAULT, made_model, said
from refusal import refused
from rpc import Rpc
from up import Up, lend_model
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import AsyncClient, Client
from ringfort.calls import embedding
from ringfort.errors import FailedPrecondition, RingfortError

Artifact = Callable[..., Path]


@pytest.fixture
def name() -> str:
    """A model's name of the test's own."""
    return f"m-{uuid4().hex[:8]}"


@pytest.fixture
def artifact(model_dir: Path, tmp_path: Path, name: str) -> Artifact:
    """Makes model directories: the default model's files under another name, with what else is said of it."""

    def make(version: str = "1", **facts: object) -> Path:
        return made_model(model_dir, tmp_path / f"{name}-{version}", name=name, version=version, **facts)

    return make


def register(rpc: Rpc, directory: Path) -> pb.Model:
    return rpc.model.Register(pb.RegisterModelRequest(artifact=str(directory)))


def states(rpc: Rpc, name: str) -> dict[str, str]:
    models = rpc.model.List(pb.ListModelsRequest()).models
    return {m.version: pb.Model.State.Name(m.state) for m in models if m.name == name}


def embed(rpc: Rpc, model: str, *texts: str, **options: object) -> np.ndarray:
    answer = rpc.embedding.Embed(pb.EmbedRequest(model=model, texts=texts, **options))
    return np.frombuffer(answer.vectors.data, "<f4").reshape(answer.vectors.rows, answer.vectors.dim)


def test_the_default_model_is_live_and_named(rpc: Rpc) -> None:
    first = rpc.model.List(pb.ListModelsRequest()).models[0]
    assert (f"{first.name}@{first.version}", first.state) == (DEFAULT, pb.Model.LIVE)
    refusal = refused(
        lambda: rpc.model.Promote(pb.PromoteModelRequest(name=first.name, version=first.version))
    )
    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION


def test_a_registered_model_answers_by_version_and_once_live_by_name(
    rpc: Rpc, artifact: Artifact, name: str
) -> None:
    made = register(rpc, artifact(prompts={"query": "a question about "}, space=uuid4().hex[:16]))
    assert (made.name, made.version, made.state, made.dim) == (name, "1", pb.Model.STAGED, 384)
    assert made.registered_at.seconds > 0
    assert np.array_equal(
        embed(rpc, f"{name}@1", "parsing json"), embed(rpc, "", "a question about parsing json")
    )
    refusal = refused(lambda: embed(rpc, name, "parsing json"))
    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "no version" in refusal.message
    assert rpc.model.Promote(pb.PromoteModelRequest(name=name, version="1")).state == pb.Model.LIVE
    answer = rpc.embedding.Embed(pb.EmbedRequest(model=name, texts=["parsing json"]))
    assert (answer.model, answer.variant) == (f"{name}@1", made.variant)
    refusal = refused(lambda: embed(rpc, f"{name}@2", "x"))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "model")


def test_a_rollback_returns_to_what_was_live(rpc: Rpc, artifact: Artifact, name: str) -> None:
    for version in ("1", "2"):
        register(rpc, artifact(version))
        rpc.model.Promote(pb.PromoteModelRequest(name=name, version=version))
    assert states(rpc, name) == {"1": "RETIRED", "2": "LIVE"}
    assert rpc.model.Rollback(pb.RollbackModelRequest(name=name)).version == "1"
    assert states(rpc, name) == {"1": "LIVE", "2": "RETIRED"}
    refusal = refused(lambda: rpc.model.Rollback(pb.RollbackModelRequest(name=name)))
    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    missing = refused(lambda: rpc.model.Promote(pb.PromoteModelRequest(name=name, version="9")))
    assert (missing.code, missing.field) == (grpc.StatusCode.NOT_FOUND, "version")


def test_a_collection_stays_with_its_version(
    rpc: Rpc, client: Client, make_collection: Callable[..., str], artifact: Artifact, name: str
) -> None:
    for version, prompt in (("1", "red "), ("2", "green ")):
        register(
            rpc,
            artifact(version, space=uuid4().hex[:16], prompts={"query": prompt, "document": prompt}),
        )
        rpc.model.Promote(pb.PromoteModelRequest(name=name, version=version))
    first = make_collection(model=f"{name}@1")
    second = make_collection(model=name)
    told = {c.name: c for c in client.collections() if c.name in (first, second)}
    assert (told[first].model, told[second].model) == (f"{name}@1", f"{name}@2")
    assert told[first].space != told[second].space
    for collection in (first, second):
        client.upsert(collection, [{"id": "apple", "text": "apple"}, {"id": "stone", "text": "stone"}])
    with ThreadPoolExecutor(4) as pool:
        hits = list(pool.map(lambda c: client.search(c, text="apple", k=1)[0], [first, second] * 4))
    assert {hit.id for hit in hits} == {"apple"}
    stored = [client.get(c, ["apple"], include=["vector"])[0] for c in (first, second)]
    for document, model in zip(stored, (f"{name}@1", f"{name}@2"), strict=True):
        assert document is not None
        assert np.allclose(document.vector, embed(rpc, model, "apple")[0], atol=1e-6)
    assert not np.allclose(stored[0].vector, stored[1].vector, atol=1e-3)


def test_declared_lengths_are_spaces_of_their_own(
    rpc: Rpc, client: Client, make_collection: Callable[..., str], artifact: Artifact, name: str
) -> None:
    register(rpc, artifact(dimensions=[128, 256]))
    whole = embed(rpc, f"{name}@1", "apple", "stone")
    head = embed(rpc, f"{name}@1", "apple", "stone", dimensions=128)
    assert head.shape == (2, 128)
    wanted = whole[:, :128] / np.linalg.norm(whole[:, :128], axis=1, keepdims=True)
    assert np.allclose(head, wanted, atol=1e-6)
    spaces = {
        rpc.embedding.Embed(pb.EmbedRequest(model=f"{name}@1", texts=["a"], dimensions=dim)).space
        for dim in (0, 128, 256, 384)
    }
    assert len(spaces) == 3
    refusal = refused(lambda: embed(rpc, f"{name}@1", "apple", dimensions=64))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "dimensions")
    assert "declares 128, 256" in refusal.message
    short = make_collection(model=f"{name}@1", dim=128)
    client.upsert(short, [{"id": "apple", "text": "apple"}, {"id": "stone", "text": "stone"}])
    assert client.search(short, text="an apple", k=1)[0].id == "apple"
    (document,) = client.get(short, ["apple"], include=["vector"])
    assert document is not None
    assert np.allclose(document.vector, head[0], atol=1e-6)


def flip(directory: Path) -> None:
    data = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(bytes([data[0] ^ 1]) + data[1:])


def exchange_tokenizer(directory: Path) -> None:
    """A tokenizer of another vocabulary, whose checksum is in order."""
    facts = json.loads((directory / "tokenizer.json").read_bytes())
    facts["model"]["vocab"] |= {f"[more{i}]": 30_522 + i for i in range(7)}
    data = json.dumps(facts).encode()
    (directory / "tokenizer.json").write_bytes(data)
    files = json.loads((directory / "manifest.json").read_text())["files"]
    said(directory, files={**files, "tokenizer.json": sha256(data).hexdigest()})


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda d: (d / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
        (flip, "model.onnx: SHA-256 is"),
        (exchange_tokenizer, "a vocabulary of 30529 tokens"),
        (lambda d: said(d, dim=7), "gives 1×384, the manifest says 7"),
        (lambda d: said(d, name="../up"), "name '../up' is not letters"),
    ],
    ids=["no manifest", "no tokenizer", "another byte", "another tokenizer", "another length", "a way out"],
)
def test_what_cannot_be_run_is_refused_and_leaves_nothing(
    rpc: Rpc, service: Up, artifact: Artifact, name: str, damage: Callable[[Path], None], what: str
) -> None:
    directory = artifact()
    damage(directory)
    refusal = refused(lambda: register(rpc, directory))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "artifact")
    assert what in refusal.message
    assert states(rpc, name) == {}
    assert not list((service.data_dir / "models").glob(f"{name}@*/int8"))
    shutil.rmtree(directory)
    assert register(rpc, artifact()).version == "1", "the name is not spent"


def test_requests_that_make_no_sense_name_their_field(
    rpc: Rpc, service: Up, artifact: Artifact, name: str, tmp_path: Path
) -> None:
    directory = artifact()
    whole = str(directory)
    for request, field in (
        (pb.RegisterModelRequest(artifact=""), "artifact"),
        (pb.RegisterModelRequest(artifact="relative/path"), "artifact"),
        (pb.RegisterModelRequest(artifact="nowhere://x"), "artifact"),
        (pb.RegisterModelRequest(artifact=whole, name="other"), "name"),
        (pb.RegisterModelRequest(artifact=whole, name=name, version="2"), "version"),
    ):
        refusal = refused(lambda request=request: rpc.model.Register(request))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    register(rpc, directory)
    assert refused(lambda: register(rpc, directory)).code == grpc.StatusCode.ALREADY_EXISTS
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"name": f"{name}-rank", "version": "1", "features": {"sales": 1}}))
    ranker = pb.RegisterModelRequest(artifact=str(weights), kind=pb.Model.RANKER)
    rpc.model.Register(ranker)
    assert refused(lambda: rpc.model.Register(ranker)).code == grpc.StatusCode.ALREADY_EXISTS
    said(directory, name=f"{name}-rank", version="2")
    assert refused(lambda: register(rpc, directory)).code == grpc.StatusCode.ALREADY_EXISTS
    assert not list((service.data_dir / "models").glob(f"{name}-rank@2/*"))
    said(directory, name="all-minilm-l6-v2", version="1")
    assert refused(lambda: register(rpc, directory)).code == grpc.StatusCode.ALREADY_EXISTS
    for traffic, code, field in (
        (pb.SetTrafficRequest(name=name, version="1", percent=101), "INVALID_ARGUMENT", "percent"),
        (pb.SetTrafficRequest(name=name, version="2", percent=1), "NOT_FOUND", "version"),
        (pb.SetTrafficRequest(name=f"{name}-x", version="1", percent=1), "NOT_FOUND", "name"),
        (pb.SetTrafficRequest(name=name, version="1", percent=1), "FAILED_PRECONDITION", ""),
    ):
        refusal = refused(lambda request=traffic: rpc.model.SetTraffic(request))
        assert (refusal.code.name, refusal.field) == (code, field)


def another_graph(directory: Path) -> Path:
    """The same weights in other bytes: another variant of the model's space."""
    graph = directory / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x32\x01x")  # field 6 of a ModelProto, doc_string
    files = json.loads((directory / "manifest.json").read_text())["files"]
    said(directory, files={**files, "model.onnx": sha256(graph.read_bytes()).hexdigest()})
    return directory


def set_traffic(rpc: Rpc, name: str, version: str, percent: int) -> pb.Model:
    return rpc.model.SetTraffic(pb.SetTrafficRequest(name=name, version=version, percent=percent))


async def test_callers_sent_together_meet_the_versions_they_meet_apart(
    service: Up, rpc: Rpc, artifact: Artifact, name: str
) -> None:
    space = uuid4().hex[:16]
    register(rpc, artifact("1", space=space))
    register(rpc, another_graph(artifact("2", space=space)))
    rpc.model.Promote(pb.PromoteModelRequest(name=name, version="1"))
    set_traffic(rpc, name, "2", 30)
    texts = [f"text {i}" for i in range(40)]
    apart = [rpc.embedding.Embed(pb.EmbedRequest(model=name, texts=[text])).variant for text in texts]
    assert len(set(apart)) == 2

    async with AsyncClient(service.grpc) as awaited:

        async def met() -> list[str]:
            calls = (awaited.send(embedding.embed([text], model=name)) for text in texts)
            return [answer.variant for answer in await asyncio.gather(*calls)]

        assert await met() == apart
        assert await met() == apart
    mixed = pb.EmbedRequest(model=name, texts=texts, together=True)
    refusal = refused(lambda: rpc.embedding.Embed(mixed))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    mixed.traffic_key = "one"
    assert len(rpc.embedding.Embed(mixed).rows) == len(texts)


def test_a_canary_takes_its_share_and_every_answer_says_so(
    rpc: Rpc,
    web: httpx.Client,
    client: Client,
    make_collection: Callable[..., str],
    artifact: Artifact,
    name: str,
) -> None:
    space = uuid4().hex[:16]
    live = register(rpc, artifact("1", space=space)).variant
    canary = register(rpc, another_graph(artifact("2", space=space))).variant
    assert live != canary
    rpc.model.Promote(pb.PromoteModelRequest(name=name, version="1"))
    collection = make_collection(model=name)
    client.upsert(collection, [{"id": "apple", "text": "apple"}, {"id": "stone", "text": "stone"}])
    users = [f"user-{i}" for i in range(60)]

    def embedded() -> dict[str, str]:
        requests = [pb.EmbedRequest(model=name, texts=["apple"], traffic_key=user) for user in users]
        return {r.traffic_key: rpc.embedding.Embed(r).variant for r in requests}

    def searched() -> dict[str, pb.SearchResponse]:
        requests = [pb.SearchRequest(collection=collection, text="pear", traffic_key=u) for u in users]
        return {r.traffic_key: rpc.search.Search(r) for r in requests}

    def of_canary(met: dict[str, str]) -> set[str]:
        assert set(met.values()) <= {live, canary}
        return {user for user, variant in met.items() if variant == canary}

    assert of_canary(embedded()) == set()
    told = set_traffic(rpc, name, "2", 30)
    assert (told.state, told.traffic_percent) == (pb.Model.CANARY, 30)
    shares = {m.version: m.traffic_percent for m in client.models().models if m.name == name}
    assert shares == {"1": 70, "2": 30}
    few = of_canary(embedded())
    assert 5 < len(few) < 35
    assert of_canary(embedded()) == few
    answers = searched()
    assert of_canary({user: answer.variant for user, answer in answers.items()}) == few
    assert {answer.hits[0].id for answer in answers.values()} == {"apple"}
    again = {user: answer for user, answer in searched().items() if answer.served_from != pb.INDEX}
    assert again.keys() == set(users), "an answer of either variant is kept"
    assert of_canary({user: answer.variant for user, answer in again.items()}) == few
    member, other = min(few), min(set(users) - few)
    for user, variant in ((member, canary), (other, live)):
        texts = pb.BatchSearchRequest(
            collection=collection, texts=pb.TextList(values=["pear", "rock"]), traffic_key=user
        )
        assert rpc.search.BatchSearch(texts).variant == variant
        liked = pb.RecommendRequest(collection=collection, like=[pb.Example(text="pear")], traffic_key=user)
        assert rpc.search.Recommend(liked).variant == variant
        asked = {"model": name, "input": "apple", "user": user}
        version = "2" if variant == canary else "1"
        assert web.post("/v1/embeddings", json=asked).json()["model"] == f"{name}@{version}"
        exact = pb.EmbedRequest(model=f"{name}@1", texts=["apple"], traffic_key=user)
        assert rpc.embedding.Embed(exact).variant == live
    set_traffic(rpc, name, "2", 60)
    assert few < of_canary(embedded())
    assert set_traffic(rpc, name, "2", 0).state == pb.Model.STAGED
    assert of_canary(embedded()) == set()
    set_traffic(rpc, name, "2", 1)
    assert rpc.model.Promote(pb.PromoteModelRequest(name=name, version="2")).traffic_percent == 100
    assert of_canary(embedded()) == set(users)
    assert {answer.variant for answer in searched().values()} == {canary}, "a collection follows in its space"
    set_traffic(rpc, name, "1", 50)
    assert rpc.model.Rollback(pb.RollbackModelRequest(name=name)).version == "2", "that ends the canary"
    assert states(rpc, name) == {"1": "RETIRED", "2": "LIVE"}


def test_a_canary_of_another_space_is_refused(rpc: Rpc, artifact: Artifact, name: str) -> None:
    for version in ("1", "2"):
        register(rpc, artifact(version, space=uuid4().hex[:16]))
    rpc.model.Promote(pb.PromoteModelRequest(name=name, version="1"))
    refusal = refused(lambda: set_traffic(rpc, name, "2", 10))
    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot be compared" in refusal.message
    assert states(rpc, name) == {"1": "LIVE", "2": "STAGED"}


def test_the_command_line_registers_promotes_and_lists(
    service: Up, artifact: Artifact, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ringfort.cli import main

    def run(*args: str) -> str:
        assert main(["models", *args, "--server", service.grpc]) == 0
        return capsys.readouterr().out

    assert "staged" in run("register", os.path.relpath(artifact()), "--name", f"{name}@1")
    assert json.loads(run("promote", f"{name}@1", "--json"))["state"] == "LIVE"
    run("register", str(artifact("2")))
    assert "25%" in run("traffic", f"{name}@2", "25")
    assert {"75%", "25%", "canary"} <= set(run("list").split())
    assert "live" in run("rollback", name)
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"name": f"{name}-rank", "version": "1", "features": {"sales": 1}}))
    assert "ranker" in run("register", str(weights), "--ranker")
    assert main(["models", "traffic", f"{name}@2", "101", "--server", service.grpc]) == 2
    capsys.readouterr()
    assert f"{name}@1" in run("list")
    assert DEFAULT in run("list")
    assert main(["models", "rollback", name, "--server", service.grpc]) == 1
    assert "was live before" in capsys.readouterr().err
    assert main(["models", "promote", name, "--server", service.grpc]) == 2


@pytest.fixture
def own_service(data_path: Path, model_dir: Path) -> Iterator[Callable[[], Up]]:
    """Starts and starts again a service with room for one model beside the default."""
    lend_model(model_dir, data_path)
    started: list[Up] = []

    def start() -> Up:
        started.append(Up.start(data_path, env={"RINGFORT_EMBEDDER__MODELS_BYTES": "40000000"}))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.stop()


def test_models_outlive_a_crash_and_are_fetched_again(
    own_service: Callable[[], Up], artifact: Artifact, name: str, tmp_path: Path
) -> None:
    up = own_service()
    with Client(up.grpc) as client:
        for version in ("1", "2"):
            client.register_model(str(artifact(version, space=uuid4().hex[:16])))
        client.promote_model(name, "1")
        for version in ("1", "2"):
            told = {"name": f"{name}-rank", "version": version, "features": {"sales": 1}}
            file = tmp_path / f"ranker-{version}.json"
            file.write_text(json.dumps(told))
            client.register_model(str(file), kind="RANKER")
        client.promote_model(f"{name}-rank", "1")
        client.set_traffic(f"{name}-rank", "2", 40)
        before = client.embed(["apple"], model=name)
        # There is room for one of the two at a time.
        assert np.array_equal(client.embed(["apple"], model=f"{name}@2"), before)
        assert np.array_equal(client.embed(["stone"], model=name), client.embed(["stone"]))
    # A graph that does not come to an end keeps the third registration waiting until the service is killed.
    third = artifact("3", space=uuid4().hex[:16])
    (third / "model.onnx").rename(third / "kept")
    os.mkfifo(third / "model.onnx")
    with ThreadPoolExecutor(1) as pool, Client(up.grpc) as client:
        waiting = pool.submit(client.register_model, str(third))
        eventually(lambda: list(up.data_dir.glob(f"models/{name}@3/.building-*")))
        up.kill()
        with pytest.raises(RingfortError):
            waiting.result(60)
    shutil.rmtree(up.data_dir / "models" / f"{name}@1")
    up = own_service()
    with Client(up.grpc) as client:
        listed = {f"{m.name}@{m.version}" for m in client.models().models}
        rankers = {f"{name}-rank@1", f"{name}-rank@2"}
        assert listed == {DEFAULT, f"{name}@1", f"{name}@2", *rankers}
        shares = {m.version: m.traffic_percent for m in client.models().models if m.name == f"{name}-rank"}
        assert shares == {"1": 60, "2": 40}
        assert not list(up.data_dir.glob(f"models/{name}@3/int8"))
        (third / "kept").replace(third / "model.onnx")
        assert client.register_model(str(third)).version == "3"
        assert not list(up.data_dir.glob("models/*/.building-*"))
        assert np.array_equal(client.embed(["apple"], model=name), before)
        shutil.rmtree(up.data_dir / "models" / f"{name}@2" / "int8")
        shutil.rmtree(third.with_name(f"{name}-2"))
        with pytest.raises(Exception, match=f"no embedder of {name}@2"):
            client.embed(["apple"], model=f"{name}@2")
        with pytest.raises(FailedPrecondition):
            client.rollback_model(name)
