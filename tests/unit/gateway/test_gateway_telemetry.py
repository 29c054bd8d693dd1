"""Calls are counted where they end and told when somebody asks."""

import json
import logging

from services.telemetry import LABELS_MOST, STAGES, JsonLines, Telemetry, stage
from services.trace import CURRENT, Trace, current_id


def test_calls_are_told_by_method_and_code_with_their_time() -> None:
    telemetry = Telemetry()
    search = telemetry.methods.method("Search")
    for code, seconds in (("OK", 0.0005), ("OK", 0.004), ("NOT_FOUND", 100.0)):
        search.ended(code, seconds)
    telemetry.methods.method("Embed").ended("OK", 0.1)
    told = telemetry.exposition().decode().splitlines()
    assert 'ringfort_rpc_total{code="OK",method="Search"} 2.0' in told
    assert 'ringfort_rpc_total{code="NOT_FOUND",method="Search"} 1.0' in told
    for bound, count in (("0.0005", 1), ("0.003", 1), ("0.005", 2), ("30", 2), ("+Inf", 3)):
        assert f'ringfort_rpc_seconds_bucket{{le="{bound}",method="Search"}} {count}.0' in told
    assert 'ringfort_rpc_seconds_count{method="Search"} 3.0' in told
    assert 'ringfort_rpc_seconds_sum{method="Search"} 100.0045' in told
    assert 'ringfort_rpc_total{code="OK",method="Embed"} 1.0' in told


def test_stages_are_counted_and_told_to_the_trace_of_their_call() -> None:
    telemetry = Telemetry()
    spans: list[tuple[str, float, float]] = []
    faiss = stage("faiss")
    before = count_of(telemetry, 'ringfort_stage_seconds_count{stage="faiss"}')
    faiss.took(0.004)
    trace = Trace("ab" * 16, lambda name, seconds, ago_s: spans.append((name, seconds, ago_s)))
    token = CURRENT.set(trace)
    try:
        faiss.took(0.2, 0.1)
        assert current_id() == "ab" * 16
        trace.close()
        faiss.took(0.3)  # by a task that outlived the call
        assert current_id() == ""
    finally:
        CURRENT.reset(token)
    assert spans == [("shard.faiss", 0.2, 0.1)]
    assert count_of(telemetry, 'ringfort_stage_seconds_count{stage="faiss"}') == before + 3
    assert {f'ringfort_stage_seconds_count{{stage="{name}"}}' for name in STAGES} <= told_by(telemetry).keys()


def test_without_counting_neither_calls_nor_stages_are_counted() -> None:
    try:
        telemetry = Telemetry(counting=False)
        before = told_by(telemetry)
        stage("redis").took(1.0)
        telemetry.methods.method("Search").ended("OK", 1.0)
        after = told_by(telemetry)
        name = 'ringfort_stage_seconds_count{stage="redis"}'
        assert after[name] == before[name]
        assert 'ringfort_rpc_total{code="OK",method="Search"}' not in after
    finally:
        Telemetry()


def test_labels_are_bounded() -> None:
    telemetry = Telemetry()
    telemetry.parts.add_each("model", lambda: {f"m{i}": {"texts_total": i, "queue": 1} for i in range(500)})
    told = told_by(telemetry)
    assert told['ringfort_model_texts_total{model="m7"}'] == 7
    assert sum(name.startswith("ringfort_model_queue{") for name in told) == LABELS_MOST
    telemetry.parts.add_each("hot_key", lambda: {"1": {"reads": 9}}, label="rank")
    assert told_by(telemetry)['ringfort_hot_key_reads{rank="1"}'] == 9


def test_a_log_line_carries_the_trace_id_of_the_call_under_way() -> None:
    record = logging.LogRecord("services", logging.ERROR, __file__, 1, "%s failed", ("Search",), None)
    assert "trace_id" not in json.loads(JsonLines().format(record))
    trace = Trace("cd" * 16, lambda name, seconds, ago_s: None)
    token = CURRENT.set(trace)
    try:
        event = json.loads(JsonLines().format(record))
        assert (event["message"], event["trace_id"]) == ("Search failed", "cd" * 16)
        trace.close()
        assert "trace_id" not in json.loads(JsonLines().format(record))
    finally:
        CURRENT.reset(token)


def told_by(telemetry: Telemetry) -> dict[str, float]:
    lines = [line for line in telemetry.exposition().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def count_of(telemetry: Telemetry, name: str) -> float:
    return told_by(telemetry)[name]
