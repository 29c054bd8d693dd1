"""Whose a key is, and what needs an operator's."""

import pytest

from services.gateway.callers import OPERATORS_ONLY, Callers
from services.gateway.server import SERVICES
from shard_router.errors import Unauthenticated


def test_a_key_is_its_tenant_s_or_an_operator_s() -> None:
    callers = Callers({"red-key": "red"}, {"root-key": "red"})
    assert not callers.open
    assert callers.of("red-key") == ("red-key", "red", False)
    assert callers.of("root-key") == ("root-key", "red", True)
    for unknown in ("", "red-key ", "red"):
        with pytest.raises(Unauthenticated):
            callers.of(unknown)
    assert Callers({}, {}).open


def test_every_method_named_exists_and_every_change_of_models_is_named() -> None:
    for service, methods in OPERATORS_ONLY.items():
        assert methods <= {method.name for method in SERVICES[service].methods}
    models = {method.name for method in SERVICES["ModelService"].methods}
    assert models - OPERATORS_ONLY["ModelService"] == {"List"}
    cluster = {method.name for method in SERVICES["ClusterService"].methods}
    reads = {"Describe", "HotKeys", "CacheStats", "WarmCache"}
    assert cluster - OPERATORS_ONLY["ClusterService"] == reads
