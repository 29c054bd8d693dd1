from services.cache.survey import Numbers, Survey


def looked(*looks: tuple[int, int, int]) -> tuple[Survey, list[str]]:
    """A survey of (entries, evicted, expired), and what it said each time."""
    survey = Survey()
    return survey, [survey.look(Numbers(n, 10 * n, evicted, expired)) for n, evicted, expired in looks]


def test_growth_expiry_and_a_few_evictions_are_no_news():
    survey, news = looked((1_000, 50, 0), (2_000, 60, 0), (1_500, 60, 500), (1_490, 65, 505))
    assert news == [""] * 4
    assert (survey.evicted, survey.removed) == (15, 0)


def test_a_tenth_evicted_between_two_looks_is_a_storm():
    survey, news = looked((10_000, 0, 0), (9_500, 1_000, 0), (9_500, 1_001, 0))
    assert news == ["", "redis evicted 1000 of 10000 keys in a moment", ""]
    assert (survey.eviction_storms, survey.purges, survey.evicted) == (1, 0, 1_001)


def test_keys_gone_without_eviction_or_expiry_were_removed():
    survey, news = looked((10_000, 7, 7), (8_900, 7, 107), (8_890, 7, 107), (0, 0, 0))
    assert news[1:] == [
        "1000 of 10000 keys of redis were removed",
        "",
        "8890 of 8890 keys of redis were removed",
    ]
    assert (survey.purges, survey.removed) == (2, 9_900)


def test_a_few_keys_of_a_few_are_nothing():
    survey, news = looked((50, 0, 0), (0, 0, 0))
    assert news == ["", ""]
    assert (survey.removed, survey.purges) == (50, 0)
