"""A canary has the share it was given, of the same keys every time, and with a larger share only more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.traffic import Canary

KEYS = [b"key %d" % i for i in range(5_000)]
percents = st.integers(1, 100)
names = st.text(min_size=1, max_size=20)


def share(canary: Canary, tenant: str = "t") -> set[bytes]:
    return {key for key in KEYS if canary.takes(tenant, key)}


@given(names, names, st.binary(), percents, percents)
def test_a_larger_share_only_adds_keys(model: str, tenant: str, key: bytes, one: int, other: int) -> None:
    small, large = Canary(model, min(one, other)), Canary(model, max(one, other))
    assert small.takes(tenant, key) == Canary(model, small.percent).takes(tenant, key)
    assert large.takes(tenant, key) or not small.takes(tenant, key)


@given(names, names, st.binary())
def test_all_is_every_key(model: str, tenant: str, key: bytes) -> None:
    assert Canary(model, 100).takes(tenant, key)


@pytest.mark.parametrize("percent", [1, 5, 25, 50, 75, 99])
@pytest.mark.parametrize("model", ["m@1", "m@2", "shop@2026-11"])
def test_the_share_is_right(model: str, percent: int) -> None:
    # The hash is fixed, so these counts are too; three in a hundred is beyond four times their spread.
    assert len(share(Canary(model, percent))) / len(KEYS) == pytest.approx(percent / 100, abs=0.03)


def test_tenants_and_canaries_have_shares_of_their_own() -> None:
    half = share(Canary("m@1", 50))
    for other in (share(Canary("m@1", 50), tenant="u"), share(Canary("m@2", 50))):
        assert len(half & other) / len(KEYS) == pytest.approx(0.25, abs=0.03)


def test_a_key_meets_the_same_version_in_every_release() -> None:
    taken = [i for i in range(40) if Canary("m@2", 20).takes("default", b"user-%d" % i)]
    # Golden: users would jump between versions if it changed.
    assert taken == [1, 2, 4, 17, 20, 28, 30, 31, 33, 34, 39]
