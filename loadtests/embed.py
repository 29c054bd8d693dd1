"""Embedding: what the engine gains over FP32, and what the service adds to the engine."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import NamedTuple

import grpc
import numpy as np
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from index_builder.models.source import ModelSource, packaged_model
from index_builder.models.tokenizer import padded
from loadtests import embed_rivals
from loadtests.callers import Callers
from loadtests.corpus import new_texts
from loadtests.engine import BATCH_TOKENS, Batch, Engine, by_length, in_order
from loadtests.gemm import int8_products, operations_per_token
from loadtests.quality import Judged
from loadtests.run import Costed, Run
from loadtests.scoreboard import Measured
from loadtests.timing import alone, excess, median, ratio, repeat, take_turns
from ringfort import Client

_SEED = 7
_BATCH_ROWS = 32
_QUERY_TOKENS, _PASSAGE_TOKENS = 10, 128
#: Mixed lengths are spread evenly over their logarithm: most texts are short, most tokens are of long ones.
_LEAST_TOKENS, _MOST_TOKENS = 4, 160
_CALLERS = 64
#: About as long as one text takes.
_PAUSE_S = 0.002


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    stream = _token_stream(run)
    yield from _against_fp32(run, stream)
    yield _gemm_share(run, stream)
    yield _length_aware(run, stream)
    yield from embed_rivals.measure(run, {
        "query": [_text_of(stream, i, _QUERY_TOKENS) for i in range(run.sized(8, 1) * _BATCH_ROWS)],
        "passage": [_text_of(stream, i, _PASSAGE_TOKENS) for i in range(run.sized(2, 1) * _BATCH_ROWS)],
    })  # fmt: skip
    texts = new_texts(run.packages)
    yield from _rpc_us_per_text(run, texts)
    for side in run.sides:
        yield _added_ms(run, side, texts)


def _against_fp32(run: Run, stream: np.ndarray) -> Iterator[Measured]:
    int8, fp32 = (Engine(run.manifest(precision), threads=1) for precision in ("int8", "fp32"))
    for name, tokens, batches in (
        ("query", _QUERY_TOKENS, run.sized(16, 1)),
        ("passage", _PASSAGE_TOKENS, run.sized(2, 1)),
    ):
        texts = batches * _BATCH_ROWS
        work = in_order([_text_of(stream, i, tokens) for i in range(texts)], _BATCH_ROWS)
        int8_s, fp32_s = take_turns(
            run.rounds,
            *(partial(_processor_s, engine, work) for engine in (int8, fp32)),
        )
        detail = {
            "unit": "texts per CPU-second, one thread",
            "int8": texts / median(int8_s),
            "fp32": texts / median(fp32_s),
            "cosine_p1_to_fp32": int8.manifest.agreement.p1,
        }
        yield Measured(f"embed.int8_vs_fp32.{name}", ratio(fp32_s, int8_s), detail)


def _processor_s(engine: Engine, work: Sequence[Batch]) -> float:
    return engine.run(work).processor_s


def _gemm_share(run: Run, stream: np.ndarray) -> Measured:
    engine = Engine(run.manifest(), threads=1)
    texts = run.sized(48, 6)
    work = by_length([_text_of(stream, i, _PASSAGE_TOKENS) for i in range(texts)])
    operations = texts * _PASSAGE_TOKENS * operations_per_token(ModelSource.open(packaged_model()))
    ours, host = take_turns(
        run.rounds, lambda: operations / engine.run(work).processor_s, int8_products(BATCH_TOKENS)
    )
    detail = {
        "unit": "operations a second of one thread; attention is not counted as achieved",
        "ours": median(ours),
        "host": median(host),
    }
    return Measured("embed.gemm_share", ratio(ours, host), detail)


def _length_aware(run: Run, stream: np.ndarray) -> Measured:
    engine = Engine(run.manifest(), threads=1)
    texts = run.sized(512, 64)
    mixed, ids = _mixed(run, engine, stream, texts)
    packed = in_order(ids, _BATCH_ROWS)
    # An engine that does not pack computes what it pads; a mask of ones is that, and nothing else differs.
    arrival = [(matrix, np.ones_like(mask), rows) for matrix, mask, rows in packed]
    aware = by_length(ids)
    aware_s, arrival_s = take_turns(
        run.rounds, lambda: engine.run(aware).processor_s, lambda: engine.run(arrival).processor_s
    )
    packed_s = repeat(run.rounds, lambda: engine.run(packed).processor_s)
    detail = {
        "texts": texts,
        "of": mixed,
        "texts_a_batch": {"by_length": texts / len(aware), "arrival": _BATCH_ROWS},
        "padding": {"by_length": _padding(aware), "arrival": _padding(packed)},
        "texts_per_cpu_s": {
            "by_length": texts / median(aware_s),
            "arrival": texts / median(arrival_s),
            "arrival_packed": texts / median(packed_s),
        },
    }
    return Measured("embed.length_aware", ratio(arrival_s, aware_s), detail)


def _mixed(run: Run, engine: Engine, stream: np.ndarray, texts: int) -> tuple[str, list[np.ndarray]]:
    """Token ids of so many texts, short and long, in no order; and what they are.

    Descriptions of packages and abstracts, as many of each, where there are judged collections.
    """
    rng = random.Random(_SEED)
    if run.judged is not None and (run.judged / "cranfield").is_dir():
        abstracts = rng.sample(Judged.read(run.judged / "cranfield").documents, texts // 2)
        descriptions = [package.summary for package in rng.sample(run.packages, texts - len(abstracts))]
        return "descriptions and abstracts", engine.tokenize(rng.sample(abstracts + descriptions, texts))
    growth = math.log(_MOST_TOKENS / _LEAST_TOKENS)
    lengths = [round(_LEAST_TOKENS * math.exp(growth * rng.random())) for _ in range(texts)]
    return "lengths by chance", [_text_of(stream, i, length) for i, length in enumerate(lengths)]


def _rpc_us_per_text(run: Run, texts: Iterator[str]) -> Iterator[Measured]:
    """The client as it is, and one that sends a call for each text; each on every server."""
    count = run.sized(2_000, 200)
    spent: dict[tuple[str, str], list[_Spent]] = {}

    def measure(key: tuple[str, str], callers: Callers) -> None:
        # Nobody finds what another was told.
        asked = list(islice(texts, count))

        async def call(number: int) -> object:
            return await callers.client.embed([asked[number]])

        service, batches = run.sides[key[1]], by_length(run.engine.tokenize(asked))
        ours = run.costed(partial(callers.calls, _CALLERS, count, call), service)
        # The same texts at once afterwards: a shared host's processors are not as fast from minute to minute.
        engine_us = 1e6 * run.engine.run(batches).processor_s / count
        empty = run.costed(partial(callers.calls, _CALLERS, count, callers.nothing), service)
        spent.setdefault(key, []).append(_Spent(ours, engine_us, empty))

    with ExitStack() as stack:
        all_callers = {
            (how, side): stack.enter_context(Callers(each.grpc, **options))
            for how, options in (("", {}), (".apart", {"embed_together": 1}))
            for side, each in run.sides.items()
        }
        # One round more than is counted: the first is to warm up.
        for _ in range(run.rounds + 1):
            for key, callers in all_callers.items():
                measure(key, callers)
    for how in ("", ".apart"):
        counted = {side: spent[how, side][1:] for side in run.sides}
        detail = {
            "unit": "CPU us a text, tokenizing and Valkey included",
            **_Spent.detail(counted[""]),
            **{side.strip("."): _Spent.detail(rounds) for side, rounds in counted.items() if side},
        }
        yield Measured(f"embed.rpc_us_per_text.c64{how}", _Spent.beyond(counted[""]), detail)


class _Spent(NamedTuple):
    """What one round's texts cost on one server and in the engine alone, and as many empty calls."""

    ours: Costed
    engine_us: float
    empty: Costed

    @staticmethod
    def beyond(rounds: "Sequence[_Spent]") -> float:
        """CPU us a text beyond the engine's own, the middle of some rounds."""
        return excess([each.ours.call_us for each in rounds], [each.engine_us for each in rounds])

    @staticmethod
    def detail(rounds: "Sequence[_Spent]") -> dict[str, object]:
        """The middle of some rounds."""
        return {
            "beyond_engine": _Spent.beyond(rounds),
            "engine": median(each.engine_us for each in rounds),
            "service": median(each.ours.service_us for each in rounds),
            "client": median(each.ours.client_us for each in rounds),
            "empty_call": median(each.empty.call_us for each in rounds),
            "texts_per_s": median(each.ours.load.per_s for each in rounds),
        }


def _added_ms(run: Run, side: str, texts: Iterator[str]) -> Measured:
    engine = Engine(run.manifest(), threads=1)
    ids = engine.tokenize(list(islice(texts, 512)))
    alone_s = run.seconds / 2

    def encode(number: int) -> None:
        engine.model.encode(*padded([ids[number % len(ids)]]))

    server = run.sides[side].grpc
    with Client(server) as client, grpc.insecure_channel(server) as channel:
        check = HealthStub(channel).Check
        ours, engines = take_turns(
            run.rounds,
            lambda: alone(alone_s, lambda _: client.embed([next(texts)])).quantile_ms(0.5),
            lambda: alone(alone_s, encode).quantile_ms(0.5),
        )
        # Engine and transport wait for each other, and what has waited is slower: caches are cold, processors
        # asleep. This is what both take that the service adds nothing to.
        paused = repeat(run.rounds, lambda: alone(alone_s, encode, pause_s=_PAUSE_S).quantile_ms(0.5))
        empty = repeat(
            run.rounds,
            lambda: alone(
                alone_s, lambda _: check(HealthCheckRequest(), timeout=60), pause_s=_PAUSE_S
            ).quantile_ms(0.5),
        )
    detail = {
        "unit": "p50 ms, one caller, one text of about ten tokens",
        "grpc": median(ours),
        "engine": median(engines),
        "engine_after_pause": median(paused),
        "empty_call_after_pause": median(empty),
    }
    return Measured(f"embed.added_ms.c1{side}", excess(ours, engines), detail)


def _token_stream(run: Run) -> np.ndarray:
    """Token ids of many descriptions end to end, without the tokens that mark ends; int32."""
    texts = [package.summary for package in run.packages[:4_000]]
    return np.concatenate([ids[1:-1] for ids in run.engine.tokenize(texts)])


def _text_of(stream: np.ndarray, number: int, tokens: int) -> np.ndarray:
    """One text of exactly so many tokens, int32, its ends marked as the model wants them."""
    start = number * (_MOST_TOKENS + 1) % (len(stream) - tokens)
    first, last = 101, 102  # [CLS] and [SEP] of the packaged tokenizer
    return np.concatenate([[first], stream[start : start + tokens - 2], [last]]).astype(np.int32)


def _padding(batches: Sequence[Batch]) -> float:
    """Tokens that are run for each token there is."""
    return sum(mask.size for _, mask, _ in batches) / sum(int(mask.sum()) for _, mask, _ in batches)
