"""Who is let in."""

import pytest

from services.gateway.admission import Admission
from shard_router.errors import Overloaded, QuotaExceeded, Unavailable


def test_the_in_flight_cap_refuses_and_recovers() -> None:
    admission = Admission(max_in_flight=2)
    admission.enter("", 0.0)
    admission.enter("", 0.0)
    with pytest.raises(Overloaded) as refused:
        admission.enter("", 0.0)
    assert refused.value.retry_after_ms is not None
    admission.leave()
    admission.enter("", 0.0)
    assert admission.stats() == {"in_flight": 2, "in_flight_limit": 2, "refused_total": 1}


def test_a_key_has_its_rate_and_others_have_theirs() -> None:
    admission = Admission(max_in_flight=100, rate_per_key=2.0)
    admission.enter("a", 0.0)
    admission.enter("a", 0.0)
    with pytest.raises(QuotaExceeded) as refused:
        admission.enter("a", 0.0)
    assert refused.value.retry_after_ms == 501
    admission.enter("b", 0.0)
    admission.enter("a", 0.6)
    assert admission.in_flight == 4, "a refused call is not counted in"


def test_a_closed_door_lets_out_and_nobody_in() -> None:
    admission = Admission(max_in_flight=2)
    admission.enter("", 0.0)
    admission.close()
    with pytest.raises(Unavailable, match="shutting down"):
        admission.enter("", 0.0)
    admission.leave()
    assert admission.stats() == {"in_flight": 0, "in_flight_limit": 2, "refused_total": 1}
