"""Leases: the holder's ends before the granter's, and who lapsed has to catch up."""

from hypothesis import given
from hypothesis import strategies as st

from shard_router.leases import GrantedLeases, HeldLease


def test_a_lease_counts_from_when_its_renewal_was_sent() -> None:
    lease = HeldLease(1.0)
    assert not lease.valid(0.0)
    lease.renewed(sent_s=5.0, now_s=5.6, position=7)
    assert lease.valid(5.99)
    assert not lease.valid(6.0)


def test_a_holder_answers_only_once_it_has_caught_up() -> None:
    lease = HeldLease(1.0)
    lease.renewed(0.0, 0.1, position=7)
    assert not lease.may_answer(0.2)
    lease.caught_up(6)
    assert not lease.may_answer(0.2)
    lease.caught_up(7)
    assert lease.may_answer(0.2)
    # In time: nothing was missed. Too late: it may have been.
    lease.renewed(0.5, 0.6, position=100)
    assert lease.may_answer(1.2)
    lease.renewed(2.0, 2.1, position=200)
    assert not lease.may_answer(2.2)
    lease.caught_up(200)
    assert lease.may_answer(2.2)


def test_an_answer_that_overtakes_a_later_one_shortens_nothing() -> None:
    lease = HeldLease(1.0)
    lease.renewed(3.0, 3.5, position=0)
    lease.renewed(2.0, 3.6, position=0)
    assert lease.until_s == 4.0


def test_the_granter_waits_for_those_whose_leases_may_be_valid() -> None:
    leases = GrantedLeases(1.0, drift=0.1)
    leases.grant("a", 0.0)
    leases.grant("b", 0.5)
    assert leases.holders(1.05) == {"a", "b"}
    assert leases.holders(1.2) == {"b"}
    assert round(leases.lapse_s(1.2), 6) == 0.4
    assert leases.lapse_s(9.0) <= 0.0 or leases.holders(9.0) == set()


@given(st.floats(0, 1e3), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.991, 1.0), st.floats(0.01, 3.0))
def test_no_holder_believes_in_a_lease_that_its_granter_knows_to_be_over(
    sent_s: float, there_s: float, back_s: float, speed: float, later_s: float
) -> None:
    """Times are the granter's; the holder's clock runs slower by up to the drift."""
    held, granted = HeldLease(1.0), GrantedLeases(1.0, drift=0.01)
    granted.grant("holder", sent_s + there_s)
    received_s = sent_s + there_s + back_s
    held.renewed(sent_s * speed, received_s * speed, position=0)
    asked_s = received_s + later_s
    if "holder" not in granted.holders(asked_s):
        assert not held.valid(asked_s * speed)
