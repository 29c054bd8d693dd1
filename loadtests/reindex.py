"""Another model for a collection: how fast its vectors are made, and what searches notice of that."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from index_builder.models.space import variant_id
from loadtests.corpus import ATTRIBUTES
from loadtests.engine import by_length
from loadtests.run import Run, settled
from loadtests.scoreboard import Measured
from loadtests.timing import Load, alone, median, ratio, take_turns
from protos.ringfort import v1 as pb
from ringfort import Client

#: Most documents of one round.
_DOCUMENTS, _QUICK_DOCUMENTS = 6_000, 300
_COLLECTION, _OTHER = "reindexed", "other"
_K, _BATCH = 10, 512
#: How often a job is looked at, and how long one may take.
_LOOK_S, _JOB_S = 0.02, 600.0
#: How the job says that vectors are being made.
_MAKING = ("", "making vectors")


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    count = min(run.sized(_DOCUMENTS, _QUICK_DOCUMENTS), len(run.packages))
    with run.start(run.new_data_dir("reindex")) as service, Client(service.grpc, timeout_s=120) as client:
        client.register_model(str(_other_model(run)))
        client.create_collection(_COLLECTION, attributes=ATTRIBUTES)
        rows = zip(run.packages[:count], run.vectors[:count], strict=True)
        client.upsert(_COLLECTION, (package.document(vector) for package, vector in rows), batch=_BATCH)
        settled(client, _COLLECTION)
        yield _rate(run, client, count)
        yield _while_it_is_built(run, client, count)


def _other_model(run: Run) -> Path:
    """The default model's files as a model of another space."""
    manifest = run.manifest()
    directory = shutil.copytree(manifest.directory, run.scratch / _OTHER)
    path = directory / "manifest.json"
    facts = json.loads(path.read_text())
    facts |= {"name": _OTHER, "version": "1", "space": f"{facts['space']}-{_OTHER}"[-16:]}
    facts["variant"] = variant_id(
        space=facts["space"],
        precision=facts["precision"],
        engine="onnx",
        artifact_sha256=facts["files"]["model.onnx"],
    )
    path.write_text(json.dumps(facts))
    return directory


def _rate(run: Run, client: Client, count: int) -> Measured:
    """From the call until all vectors are durable, against the engine alone on the same texts."""
    ids = run.engine.tokenize([package.summary for package in run.packages[:count]])
    batches = by_length(ids)
    _built(client)  # loads the model
    rest: list[float] = []

    def ours() -> float:
        vectors_s, whole_s = _built(client)
        rest.append(whole_s - vectors_s)
        return vectors_s

    took, engines = take_turns(run.rounds, ours, lambda: run.engine.run(batches).seconds, warm_up=False)
    detail = {
        "unit": "documents a second until their vectors are durable; the engine's were tokenized before",
        "documents": count,
        "service": count / median(took),
        "engine": count / median(engines),
        "rest_s": median(rest),
    }
    return Measured("reindex.vs_engine", ratio(engines, took), detail)


def _while_it_is_built(run: Run, client: Client, count: int) -> Measured:
    """One caller's vector searches: before, and while a generation is built and becomes the live one."""

    def search(number: int) -> None:
        vector = run.query_vectors[number % len(run.query_vectors)]
        answer = client.search(_COLLECTION, vector=vector, k=_K, include=(), cache=False)
        incomplete.append(not answer.coverage.complete)

    incomplete: list[bool] = []
    alone(run.seconds, search)
    quiet, during = [alone(5 * run.seconds, search)], []
    for _ in range(run.rounds):
        job = client.reindex(_COLLECTION, model=f"{_OTHER}@1")
        while client.job(job.id).state == pb.Job.RUNNING:
            during.append(alone(0.25, search))
        if (job := client.job(job.id)).state != pb.Job.SUCCEEDED:
            raise RuntimeError(f"the job ended so: {job.message}")
    value = _p99_ms(during) / _p99_ms(quiet)
    detail = {
        "unit": "p99 ms of one caller's vector searches",
        "documents": count,
        "before": {"p50_ms": quiet[0].quantile_ms(0.5), "p99_ms": _p99_ms(quiet)},
        "during": {"p50_ms": float(np.median(_all_ms(during))), "p99_ms": _p99_ms(during)},
        "incomplete": sum(incomplete),
    }
    return Measured("reindex.p99_during", value, detail)


def _all_ms(loads: list[Load]) -> list[float]:
    return [ms for load in loads for ms in load.latencies_ms]


def _p99_ms(loads: list[Load]) -> float:
    return Load(sum(load.seconds for load in loads), _all_ms(loads)).quantile_ms(0.99)


def _built(client: Client) -> tuple[float, float]:
    """Seconds until a generation's vectors were made, and until it could be activated."""
    began_s = time.perf_counter()
    job, vectors_s = client.reindex(_COLLECTION, model=f"{_OTHER}@1"), 0.0
    while job.state == pb.Job.RUNNING:
        if not vectors_s and job.message not in _MAKING:
            vectors_s = time.perf_counter() - began_s
        if time.perf_counter() - began_s > _JOB_S:
            raise RuntimeError(f"the job is at {job.done} of {job.total} after {_JOB_S:g} s")
        time.sleep(_LOOK_S)
        job = client.job(job.id)
    if job.state != pb.Job.SUCCEEDED:
        raise RuntimeError(f"the job ended so: {job.message}")
    whole_s = time.perf_counter() - began_s
    return vectors_s or whole_s, whole_s
