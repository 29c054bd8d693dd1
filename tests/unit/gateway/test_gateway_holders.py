"""Whom something has to wait for, by leases and by what was heard."""

from services.gateway.holders import DRIFT, Holders

LEASE_S = 10.0
LASTS_S = LEASE_S * (1 + DRIFT)


def granted(*names: str, now_s: float = 100.0) -> Holders:
    holders = Holders(LEASE_S, now_s=0.0)
    for name in names:
        holders.grant(name, now_s, now_s)
    return holders


def test_nobody_is_waited_for_where_nobody_holds_a_lease():
    assert granted().wait_until_s(1, 100.0) is None


def test_a_granter_that_begins_waits_for_the_leases_of_the_one_before():
    holders = Holders(LEASE_S, now_s=50.0)
    assert holders.wait_until_s(1, 50.0) == 50.0 + LASTS_S
    assert holders.wait_until_s(1, 50.0 + LASTS_S) is None


def test_who_has_not_heard_is_waited_for_until_the_lease_is_over():
    holders = granted("one", "two")
    holders.heard("one", 5, 5)
    assert holders.wait_until_s(5, 101.0) == 100.0 + LASTS_S
    assert holders.wait_until_s(5, 100.0 + LASTS_S) is None


def test_the_granter_waits_longer_than_a_holder_with_a_slow_clock_believes():
    holders = granted("one")
    # Sent at 99, granted at 100: the holder relies on it for LEASE_S of its clock, however slow by DRIFT.
    assert holders.wait_until_s(1, 100.0) > 99.0 + LEASE_S * (1 + DRIFT)


def test_who_has_heard_is_not_waited_for():
    holders = granted("one", "two")
    holders.heard("one", 5, 4)
    holders.heard("two", 6, 6)
    assert holders.wait_until_s(5, 101.0) is None
    assert holders.wait_until_s(5, 101.0, settled=True) == 100.0 + LASTS_S
    holders.heard("one", 5, 5)
    assert holders.wait_until_s(5, 101.0, settled=True) is None


def test_old_words_that_come_late_take_nothing_back():
    holders = granted("one")
    holders.heard("one", 6, 6)
    holders.heard("one", 5, 5)
    assert holders.wait_until_s(6, 101.0, settled=True) is None


def test_a_lease_given_back_is_over():
    holders = granted("one")
    holders.leave("one")
    assert holders.wait_until_s(1, 101.0) is None
    assert holders.leased(101.0) == set()


def test_what_a_holder_had_heard_counts_no_more_after_its_lease_was_over():
    holders = granted("one")
    holders.heard("one", 5, 5)
    later_s = 100.0 + LASTS_S
    holders.grant("two", later_s, later_s)
    assert holders.leased(later_s) == {"two"}
    holders.grant("one", later_s, later_s)
    assert holders.wait_until_s(5, later_s) == later_s + LASTS_S


def test_what_one_without_a_lease_says_is_not_remembered():
    holders = granted()
    holders.heard("stranger", 9, 9)
    holders.grant("stranger", 101.0, 101.0)
    assert holders.wait_until_s(9, 101.0) == 101.0 + LASTS_S


def test_who_says_nothing_any_more_loses_its_lease_however_much_it_is_told():
    holders = granted("one")
    holders.grant("one", 100.0, 105.0)
    assert holders.wait_until_s(1, 105.0) == 100.0 + LASTS_S


def test_a_renewal_that_comes_late_shortens_nothing():
    holders = granted("one")
    holders.grant("one", 95.0, 101.0)
    assert holders.wait_until_s(1, 101.0) == 100.0 + LASTS_S
