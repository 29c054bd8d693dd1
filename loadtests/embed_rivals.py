"""Ours against what else runs the same weights; rows that cannot run here say why."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np

from index_builder.models import gate
from loadtests.corpus import new_texts
from loadtests.engine import Batch, Engine, in_order
from loadtests.rivals import ABSENT, ENGINES, RivalFailed, Rivals
from loadtests.run import Run
from loadtests.scoreboard import Measured
from loadtests.timing import median, ratio, take_turns, wall_s
from ringfort import Client

_BATCH_ROWS = 32
_KINDS = ("query", "passage")


def measure(run: Run, ids: Mapping[str, Sequence[np.ndarray]]) -> Iterator[Measured]:
    """The rows of rivals; `ids` are texts of each kind, cut into batches of 32 for every engine."""
    if not Rivals.installed():
        for row in ("vs_best_engine", "vs_sentence_transformers"):
            yield from (Measured(f"embed.{row}.{kind}", None, why=ABSENT) for kind in _KINDS)
        return
    with Rivals(run.manifest("fp32").directory / "model.onnx") as rivals:
        yield from _best_engine(run, rivals, ids)
        yield from _sentence_transformers(run, rivals)


def _best_engine(run: Run, rivals: Rivals, ids: Mapping[str, Sequence[np.ndarray]]) -> Iterator[Measured]:
    ours = Engine(run.manifest(), threads=1)
    judged = ours.tokenize(gate.TEXTS)
    reference = _alone(Engine(run.manifest("fp32"), threads=1), judged)
    figures: dict[str, dict[str, object]] = {"ours": _accuracy(_alone(ours, judged), reference)}
    running: list[str] = []
    for engine in ENGINES:
        try:
            rivals.prepare(engine)
            figures[engine] = _accuracy(rivals.vectors(engine, judged), reference)
            running.append(engine)
        except RivalFailed as error:
            figures[engine] = {"why": str(error)}
    for kind in _KINDS:
        texts = ids[kind]
        batches = [texts[start : start + _BATCH_ROWS] for start in range(0, len(texts), _BATCH_ROWS)]
        work: Sequence[Batch] = in_order(texts, _BATCH_ROWS)
        ratios: dict[str, float] = {}
        for engine in running:
            our_s, their_s = take_turns(
                run.rounds,
                lambda work=work: ours.run(work).processor_s,  # type: ignore[misc]  # a default, not a parameter
                partial(rivals.processor_s, engine, batches),
            )
            ratios[engine] = ratio(their_s, our_s)
            figures[engine][kind] = len(texts) / median(their_s)
            figures["ours"][kind] = len(texts) / median(our_s)
        detail = {"unit": "texts per CPU-second, one thread, batches of 32", "over": ratios, **figures}
        if ratios:
            yield Measured(f"embed.vs_best_engine.{kind}", min(ratios.values()), detail)
        else:
            yield Measured(f"embed.vs_best_engine.{kind}", None, detail, why="no other engine runs here")


def _sentence_transformers(run: Run, rivals: Rivals) -> Iterator[Measured]:
    count = {"query": run.sized(512, 64), "passage": run.sized(128, 32)}
    #: Six words are about 14 tokens; sixty about 128.
    together = {"query": 1, "passage": 10}
    with Client(run.service.grpc, timeout_s=120) as client:
        for kind in _KINDS:
            texts = new_texts(run.packages)

            def fresh(kind: str = kind, texts: Iterator[str] = texts) -> list[str]:
                return [" ".join(islice(texts, together[kind])) for _ in range(count[kind])]

            our_s, their_s = take_turns(
                run.rounds,
                lambda fresh=fresh: _embedding_s(client, fresh()),  # type: ignore[misc]  # a default likewise
                lambda fresh=fresh: rivals.sentence_transformers_s(fresh(), run.cpus),  # type: ignore[misc]
            )
            detail = {
                "unit": f"texts a second, {run.cpus} threads each, ours through gRPC",
                "ours": count[kind] / median(our_s),
                "sentence_transformers": count[kind] / median(their_s),
            }
            yield Measured(f"embed.vs_sentence_transformers.{kind}", ratio(their_s, our_s), detail)


def _embedding_s(client: Client, texts: Sequence[str]) -> float:
    return wall_s(lambda: client.embed(texts, input_type="DOCUMENT"))


def _alone(engine: Engine, ids: Sequence[np.ndarray]) -> np.ndarray:
    return engine.run(in_order(ids, 1)).vectors


def _accuracy(vectors: np.ndarray, reference: np.ndarray) -> dict[str, object]:
    agreement = gate.agreement(vectors, reference)
    return {"cosine_mean": agreement.mean, "cosine_p1": agreement.p1, "cosine_worst": agreement.worst}
