"""Keys stop to pay where they are not found, but for a sample; and all pay again once it is found."""

from services.cache.worth import SAMPLE_EVERY, Worth

KEYS = [b"key" + i.to_bytes(2, "big") for i in range(100 * SAMPLE_EVERY)]


def looks(worth: Worth, keys: list[bytes], *, found: bool) -> list[bytes]:
    """The keys of these that were looked for, one after another and each with the same end."""
    looked = []
    for key in keys:
        if worth.pays(key):
            looked.append(key)
            worth.count([key], {key} if found else ())
    return looked


def test_keys_that_are_found_all_pay() -> None:
    worth = Worth(0.1)
    assert looks(worth, KEYS, found=True) == KEYS
    assert worth.found_share == 1


def test_keys_that_are_not_found_stop_to_pay_but_for_a_sample() -> None:
    worth = Worth(0.1)
    first = looks(worth, KEYS, found=False)
    assert 32 * SAMPLE_EVERY <= len(first) < len(KEYS), "a few misses say nothing yet"
    sample = looks(worth, KEYS, found=False)
    assert len(sample) == len(KEYS) // SAMPLE_EVERY
    assert looks(worth, KEYS, found=False) == sample, "the same at all times, so that it can be found"


def test_all_pay_again_when_the_sample_is_found() -> None:
    worth = Worth(0.1)
    for _ in range(10):
        looks(worth, KEYS, found=False)
    looks(worth, KEYS[: 8 * SAMPLE_EVERY], found=True)
    assert looks(worth, KEYS[:100], found=True) == KEYS[:100]


def test_keys_that_were_not_kept_say_nothing() -> None:
    """Once all pay again, those outside the sample are not there yet; that is no reason to stop."""
    worth = Worth(0.1)
    sample = {key for key in KEYS if key[-1] % SAMPLE_EVERY == 0}
    worth.count(KEYS, sample)
    assert worth.found_share == 1


def test_many_at_once_count_as_many() -> None:
    one, many = Worth(0.1), Worth(0.1)
    for key in KEYS[:400]:
        one.count([key], ())
    many.count(KEYS[:400], ())
    assert one.found_share == many.found_share < 1
