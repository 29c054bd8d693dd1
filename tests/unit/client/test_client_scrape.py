"""What happened between two scrapes: rates, quantiles, and a service that was restarted."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ringfort import top
from ringfort.scrape import Between, Scrape
from services.telemetry import LATENCY_BUCKETS_S, Telemetry, stage


def scrape(telemetry: Telemetry, at_s: float) -> Scrape:
    return Scrape.read(telemetry.exposition().decode(), at_s)


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 20), min_size=1, max_size=100), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(seconds: list[float], quantile: float) -> None:
    telemetry = Telemetry()
    method = telemetry.methods.method("Search")
    method.ended("OK", 40.0)
    before = scrape(telemetry, 0.0)
    for each in seconds:
        method.ended("OK", each)
    between = Between(before, scrape(telemetry, 2.0))
    assert between.rate("ringfort_rpc_total", method="Search", code="OK") == len(seconds) / 2
    told = between.quantile_s(quantile, "ringfort_rpc_seconds", method="Search")
    rank = next(i for i in range(1, len(seconds) + 1) if i >= quantile * len(seconds))
    true = sorted(seconds)[rank - 1]
    bounds = (0.0, *LATENCY_BUCKETS_S)
    at = next(i for i, bound in enumerate(LATENCY_BUCKETS_S) if true <= bound)
    assert bounds[at] <= told <= bounds[at + 1] + 1e-9


def test_a_restarted_service_counts_from_nothing() -> None:
    first, second = Telemetry(), Telemetry()
    for _ in range(5):
        first.methods.method("Embed").ended("OK", 0.1)
    second.methods.method("Embed").ended("OK", 0.1)
    between = Between(scrape(first, 0.0), scrape(second, 1.0))
    assert between.increase("ringfort_rpc_total", method="Embed", code="OK") == 1
    assert between.increase("ringfort_nothing_total") == 0
    assert between.quantile_s(0.5, "ringfort_nothing") == 0


def test_top_tells_calls_failures_and_stages() -> None:
    telemetry = Telemetry()
    telemetry.parts.add("gateway", lambda: {"in_flight": 3, "in_flight_limit": 1_024})
    before = scrape(telemetry, 10.0)
    for code in ("OK", "OK", "OK", "UNAVAILABLE"):
        telemetry.methods.method("Search").ended(code, 0.004)
    stage("postgres").took(0.2)
    between = Between(before, scrape(telemetry, 12.0))
    told = top.told(between)
    [search] = told["methods"]
    assert (search["method"], search["per_s"], search["failed_per_s"]) == ("Search", 2.0, 0.5)
    assert 3 <= search["p50_ms"] <= 5
    [postgres] = told["stages"]
    assert postgres["stage"] == "postgres"
    assert postgres["busy"] == pytest.approx(0.1)
    assert told["gauges"]["calls under way"] == 3
    assert told["resident_bytes"] > 1e6
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(top.shown(between))
    page = console.export_text()
    assert "Search" in page
    assert "postgres" in page
    assert "3 calls under way" in page
