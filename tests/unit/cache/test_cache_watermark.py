from services.cache.watermark import Watermark


def followed(position: int = 5, sent_s: float = 100.0) -> Watermark:
    watermark = Watermark(lease_s=10.0)
    watermark.renewed(sent_s, "log", position)
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
    watermark.renewed(90.0, "log", 3)
    assert watermark.known(109.0) == {"log": 9}


def test_an_early_renewal_that_comes_late_shortens_nothing():
    watermark = followed(sent_s=100.0)
    watermark.renewed(95.0, "log", 5)
    assert watermark.known(109.9) == {"log": 5}


def test_after_a_lapse_the_renewal_s_position_counts():
    watermark = followed()
    assert watermark.known(200.0) is None
    watermark.renewed(200.0, "log", 8)
    assert watermark.known(201.0) == {"log": 8}


def test_what_is_told_of_a_log_that_is_not_followed_is_not_confirmed():
    watermark = followed()
    assert not watermark.heard("next", 6)
    watermark.renewed(101.0, "next", 2)
    assert watermark.known(102.0) == {"next": 2}
    assert not watermark.heard("log", 50)
    assert watermark.known(102.0) == {"next": 2}


def test_an_old_reply_does_not_lead_back_to_the_old_log():
    watermark = followed()
    watermark.renewed(105.0, "next", 2)
    watermark.renewed(104.0, "log", 60)
    assert watermark.known(106.0) == {"next": 2}
    assert (watermark.log_id, watermark.position) == ("next", 2)
