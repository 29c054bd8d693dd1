"""Whether to look for things, and to keep them, where making them anew costs little more."""

from collections.abc import Container, Iterable

#: Weight of one look against all before it: some thirty looks are remembered.
WEIGHT = 1 / 32
#: One key of so many is always looked for and kept: the sample that the others are judged by.
SAMPLE_EVERY = 16


class Worth:
    """Whether keys pay: all while at least `least_share` of the sample is found, else the sample alone.

    The sample is the same keys at all times. So it is found as often as the others would be, had they been
    kept, and it is noticed when they come to pay. Begins in good faith: all keys pay at first. Keys are
    digests: their last byte is as good as chance.
    """

    def __init__(self, least_share: float) -> None:
        self._least_share = least_share
        #: 0 to 1, the latest looks counting most.
        self.found_share = 1.0

    def pays(self, key: bytes) -> bool:
        """Whether to look for this key, and to keep what is made in its place."""
        return self.found_share >= self._least_share or _in_sample(key)

    def count(self, looked: Iterable[bytes], found: Container[bytes]) -> None:
        """These keys were looked for; those in `found` were there."""
        for key in looked:
            if _in_sample(key):
                self.found_share += WEIGHT * ((key in found) - self.found_share)


def _in_sample(key: bytes) -> bool:
    return key[-1] % SAMPLE_EVERY == 0
