"""Calls are counted where they end and told when somebody asks."""

from services.telemetry import Telemetry


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
