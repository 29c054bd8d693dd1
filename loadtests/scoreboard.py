"""The rows of the scoreboard: what over what, the mark to reach, the goal beyond it."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Detail = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; a ratio over its own yardstick of the same run unless `what` says otherwise."""

    name: str
    #: The part of the run that measures it.
    family: str
    what: str
    mark: float | None
    goal: float | None
    lower_is_better: bool = False
    #: Why this release measures nothing here; empty where a family does.
    absent: str = ""

    def reaches(self, value: float, bar: float | None) -> bool:
        """Whether a value is at least as good as a mark or goal."""
        return bar is None or (value <= bar if self.lower_is_better else value >= bar)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a row came to in one run, or why it came to nothing."""

    name: str
    value: float | None
    detail: Detail = field(default_factory=dict)
    why: str = ""


#: Why there is no native gRPC server here; empty where there is one.
NO_NATIVE = (
    "" if importlib.util.find_spec("pygrpc_native") else "needs pygrpc-native: pip install 'ringfort[native]'"
)
_LATER = "its load does not exist yet"

#: What users would otherwise run, and what is compared with it.
PEERS = ("redisearch", "pgvector", "chroma", "lancedb", "qdrant-edge", "milvus")
_PEER_LOADS = {
    "c1": "one caller",
    "c16": "16 callers",
    "batch32": "batches of 32",
    "filter1": "a 1% filter, 16 callers",
    "ingest": "ready vectors until indexed",
}

ROWS = (
    Row("quality.rank_points", "quality", "INT8's order of pairs, points short of FP32's", 0.5, 0.1, True),
    Row("quality.ndcg_points.cranfield", "quality", "INT8 less FP32, points of nDCG@10", -1, 0),
    Row("quality.ndcg_points.cisi", "quality", "the same on CISI", -1, 0),
    Row("embed.int8_vs_fp32.query", "embed", "INT8 over FP32 in ONNX Runtime, 10 tokens, batch 32", 2.2, 4.5),
    Row("embed.int8_vs_fp32.passage", "embed", "the same, 128 tokens", 1.8, 3.9),
    Row("embed.vs_sentence_transformers.query", "embed", "over SentenceTransformer", 4, 6),
    Row("embed.vs_sentence_transformers.passage", "embed", "the same, passages", 3, 5),
    Row("embed.vs_best_engine.query", "embed", "over the fastest other INT8 engine", 1, 1.6),
    Row("embed.vs_best_engine.passage", "embed", "the same, passages", 1, 1.6),
    Row("embed.rpc_us_per_text.c64", "embed", "CPU µs a text over the engine's, 64 callers", 300, 120, True),
    Row("embed.rpc_us_per_text.c64.apart", "embed", "the same, each call sent by itself", 300, 120, True),
    Row("embed.added_ms.c1", "embed", "Embed p50 less the engine's, ms", 1.0, 0.7, True),
    Row("embed.added_ms.c1.native", "embed", "the same, native server", 0.6, 0.3, True, NO_NATIVE),
    Row("embed.length_aware", "embed", "batches by length, packed, over order of arrival, padded", 3.0, 3.3),
    Row("embed.gemm_share", "embed", "share of the host's INT8 GEMM rate", 0.33, 0.65),
    Row("search.recall.default", "search", "recall@10 after churn", 0.95, 0.97),
    Row("search.recall.high", "search", "the same at high effort", 0.99, 0.995),
    Row("search.recall.filtered", "search", "worst of 50, 10, 5, 1, 0.1% filters", 0.98, 0.995),
    Row("search.vs_faiss.c16", "search", "Search, 16 callers, over FAISS in process", 0.30, 0.42),
    Row("search.vs_faiss.c16.native", "search", "the same, native server", 0.5, 0.7, absent=NO_NATIVE),
    Row("search.vs_faiss.batch32", "search", "BatchSearch of 32 over FAISS in process", 0.70, 0.9),
    Row("search.added_ms.c1", "search", "Search p50 less FAISS's, ms", 0.8, 0.6, True),
    Row("search.added_ms.c1.native", "search", "the same, native server", 0.4, 0.2, True, NO_NATIVE),
    Row("search.filter1_vs_gather", "search", "1% filter, 16 callers, over a gather in process", 0.25, 0.5),
    *(
        Row(f"search.vs_peer.{peer}.{load}", "peers", f"over {peer}, {what}", 1, 2)
        for peer in PEERS
        for load, what in _PEER_LOADS.items()
    ),
    Row("ingest.vectors_vs_copy", "ingest", "durable vectors over bare COPY", 0.10, 0.3),
    Row("ingest.text_vs_engine", "ingest", "texts over ONNX Runtime alone", 0.70, 0.95),
    Row("cache.vs_empty_rpc.aio", "cache", "cached Search over an empty call, 16 callers", 0.6, 0.8),
    Row("cache.vs_empty_rpc.native", "cache", "the same, native server", 0.6, 0.8, absent=NO_NATIVE),
    Row("cache.batch_lookups_per_s", "cache", "cached BatchSearch rows a second", 100_000, 300_000),
    Row("cache.hit_ratio.w0", "cache", "exact answers out of the cache, nothing written", None, None),
    Row("cache.hit_ratio.w20", "cache", "the same at 20 writes a second", None, None),
    Row("cache.hit_ratio.w200", "cache", "the same at 200 writes a second", None, None),
    Row("cache.redis_relief.9010", "cache", "reads that never reach Redis, 90/10, L1 of 10%", 0.80, 0.89),
    Row("cache.redis_relief.zipf", "cache", "the same, Zipf 1.0, L1 of 1%", 0.58, 0.65),
    Row("e2e.cached_search_ms.c1", "e2e", "cached text Search, p50 ms", 1.5, 0.6, True),
    Row("e2e.text_search_ms.c1", "e2e", "text Search, p50 ms", 12, 3, True),
    Row("e2e.text_search_vs_stack", "peers", "text Search, 16 callers, over FastAPI, torch, FAISS", 4, 10),
    Row("memory.bytes_per_document", "start", "resident bytes a document", 1_200, 700, True),
    Row("start.ready_s", "start", "from disk to SERVING, seconds, on the documents there are", 3, 1, True),
    Row("start.ready_s.300k", "start", "the same with 300k documents", 3, 1, True),
    Row("cluster.vs_embedded.c64", "cluster", "text Search, 64 callers, over one process", 0.7, 0.9),
    Row("cluster.p99_during_reshard", "cluster", "p99 while slots move over before", 2.0, 1.3, True),
    Row("reindex.vs_engine", "reindex", "over the embedder's own rate", 0.90, 0.97),
    Row("reindex.p99_during", "reindex", "p99 during over before", 2.0, 1.3, True),
    Row("rank.ms_1000", "rank", "rank stage of 1,000 candidates, ms", 6, 3, True, _LATER),
    Row("rank.ndcg_gain.cranfield", "rank", "two stages less one, nDCG@10", 0, 0.05, absent=_LATER),
    Row("rank.ndcg_gain.cisi", "rank", "the same on CISI", 0, 0.05, absent=_LATER),
    Row("tail.p99_over_p50.70", "tail", "mixed load at 70% of saturation, open loop", 4, 2.5, True),
    Row("observe.cost", "observe", "throughput with metrics over without", 0.95, 0.99),
)  # fmt: skip

FAMILIES = tuple(dict.fromkeys(row.family for row in ROWS))


def of_families(families: "frozenset[str]") -> list[Row]:
    """The rows of these families, in the scoreboard's order."""
    return [row for row in ROWS if row.family in families]


def entry(row: Row, measured: Measured | None) -> dict[str, object]:
    """A row of bench.json; one without a finite value says why."""
    found: dict[str, object] = {
        "value": None,
        "mark": row.mark,
        "goal": row.goal,
        "lower_is_better": row.lower_is_better,
        "detail": dict(measured.detail) if measured else {},
    }
    if measured is not None and measured.value is not None and math.isfinite(measured.value):
        found["value"] = measured.value
    else:
        found["why"] = (measured.why if measured else row.absent) or "its family did not get to it"
    return found
