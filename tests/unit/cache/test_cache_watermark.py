from services.cache.watermark import Watermark


def followed(position: int = 5, sent_s: float = 100.0) -> Watermark:
    watermark = Watermark(lease_s=10.0)
    watermark.renewed(sent_s, {"log": position})
    return watermark


def test_nothing_is_known_before_the_first_renewal():
    assert Watermark(10.0).known(0.0) is None


def test_a_lease_counts_from_when_its_renewal_was_sent():
    watermark = followed()
    assert watermark.known(109.9) == {"log": 5}
    assert watermark.known(110.0) is None


def test_positions_grow_whatever_the_order_of_the_news():
    watermark = followed()
    assert watermark.heard("log", 9)
    assert watermark.heard("log", 7)
    assert watermark.heard("log", 9)
    watermark.renewed(90.0, {"log": 3})
    assert watermark.known(109.0) == {"log": 9}


def test_an_early_renewal_that_comes_late_shortens_nothing():
    watermark = followed(sent_s=100.0)
    watermark.renewed(95.0, {"log": 5})
    assert watermark.known(109.9) == {"log": 5}


def test_after_a_lapse_the_renewal_s_position_counts():
    watermark = followed()
    assert watermark.known(200.0) is None
    watermark.renewed(200.0, {"log": 8})
    assert watermark.known(201.0) == {"log": 8}


def test_what_is_told_of_a_log_that_is_not_followed_is_not_confirmed():
    watermark = followed()
    assert not watermark.heard("next", 6)
    watermark.renewed(101.0, {"next": 2})
    assert watermark.known(102.0) == {"next": 2}
    assert not watermark.heard("log", 50)
    assert watermark.known(102.0) == {"next": 2}


def test_an_old_reply_does_not_lead_back_to_the_old_log():
    watermark = followed()
    watermark.renewed(105.0, {"next": 2})
    watermark.renewed(104.0, {"log": 60})
    assert watermark.known(106.0) == {"next": 2}
    assert watermark.positions == {"next": 2}


def test_each_of_several_logs_has_a_position_of_its_own():
    watermark = Watermark(10.0)
    watermark.renewed(0.0, {"one": 4, "two": 7})
    assert watermark.heard("one", 6)
    assert not watermark.heard("three", 1)
    assert watermark.known(1.0) == {"one": 6, "two": 7}
    watermark.renewed(1.0, {"one": 5, "two": 9})
    assert watermark.known(2.0) == {"one": 6, "two": 9}


def test_one_of_several_logs_is_exchanged_alone():
    watermark = Watermark(10.0)
    watermark.renewed(0.0, {"one": 4, "two": 7})
    watermark.renewed(1.0, {"one": 3, "next": 2})
    assert watermark.known(2.0) == {"one": 4, "next": 2}
    assert not watermark.heard("two", 8)


def test_what_was_told_as_known_does_not_change_under_its_reader():
    watermark = followed()
    before = watermark.known(101.0)
    watermark.heard("log", 9)
    assert before == {"log": 5}
