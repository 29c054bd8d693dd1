"""Whether looking for a thing costs less than making it anew, judged by how often it was found lately."""

#: Weight of one look against all before it: some thirty looks are remembered.
WEIGHT = 1 / 32
#: Where looks pay too seldom, one of so many is still made, to notice when that changes.
PROBE_EVERY = 16


class Worth:
    """Counts looks and finds; `pays` while their share is at least `least_share`, and now and then beyond.

    Begins in good faith: the first looks are all made.
    """

    def __init__(self, least_share: float) -> None:
        self._least_share = least_share
        #: 0 to 1, the latest looks counting most.
        self.found_share = 1.0
        self._skipped = 0

    def pays(self) -> bool:
        """Whether to look this time."""
        if self.found_share >= self._least_share:
            return True
        self._skipped = (self._skipped + 1) % PROBE_EVERY
        return self._skipped == 0

    def count(self, *, looked: int, found: int) -> None:
        """So many things were looked for, and so many found."""
        kept = (1 - WEIGHT) ** looked
        if looked:
            self.found_share = self.found_share * kept + found / looked * (1 - kept)
