"""Which slots a replica follows, has whole, and answers for; pure, and belongs to one thread."""

from collections.abc import Iterable, Sequence

import numpy as np

from shard_router.errors import StaleEpoch


class Holdings:
    """The slots of one replica. What it answers for it has whole, and what it has whole it follows.

    Masks are bool [slots].
    """

    def __init__(self, slots: int, held: Iterable[int] | None, epoch: int) -> None:
        """held: those followed, whole and answered for from the start; None for all. epoch: 0 before any."""
        #: Log rows of these are applied.
        self.followed = mask_of(slots, range(slots) if held is None else held)
        #: Every document of these is here, as of the replica's cursor.
        self.whole = self.followed.copy()
        #: Searches see these, and no others.
        self.served = self.followed.copy()
        #: The map's epoch that was told last, and since which one the same slots are answered for.
        self.epoch = self.since = epoch
        #: Grows with every change of what is followed: a page of the log read before one is of no use after.
        self.changes = 0
        #: By slot, the change since which it has been followed without a break.
        self._followed_since = np.zeros(slots, np.int64)

    @property
    def follows_all(self) -> bool:
        """Whether no row of the log is left out."""
        return bool(self.followed.all())

    @property
    def masks(self) -> bool:
        """Whether there may be documents here that searches must not see."""
        return not np.array_equal(self.followed, self.served)

    def slots_followed(self) -> list[int] | None:
        """The slots to read the log for; None for all."""
        return None if self.follows_all else np.flatnonzero(self.followed).tolist()

    def require(self, epoch: int | None) -> None:
        """StaleEpoch unless, at that epoch, the slots were these; None is not checked."""
        if epoch is not None and not self.since <= epoch <= self.epoch:
            raise StaleEpoch(epoch, self.epoch)

    def follow(self, slots: Sequence[int]) -> list[int]:
        """Follow these too; those of them that are not whole here."""
        new = [slot for slot in slots if not self.followed[slot]]
        if new:
            self.changes += 1
            self.followed[new] = True
            self._followed_since[new] = self.changes
        return [slot for slot in slots if not self.whole[slot]]

    def kept(self, slots: Sequence[int], since: int) -> bool:
        """Whether these have all been followed since that change, and not given up and followed again."""
        chosen = list(slots)
        return bool((self.followed[chosen] & (self._followed_since[chosen] <= since)).all())

    def complete(self, slots: Sequence[int]) -> None:
        """These, which have been followed since they were begun to be read, are whole now."""
        self.whole[list(slots)] = self.followed[list(slots)]

    def serve(self, epoch: int, slots: Sequence[int]) -> None:
        """Answer for exactly these from that epoch on; ValueError where one is not whole, or it is over."""
        wanted = mask_of(len(self.served), slots)
        if epoch < self.epoch:
            raise ValueError(f"told of epoch {epoch} after epoch {self.epoch}")
        if not self.whole[wanted].all():
            raise ValueError(f"slots {np.flatnonzero(wanted & ~self.whole).tolist()} are not whole here")
        # Of epochs in between that nobody told of, it is not known what they were to be.
        if epoch > self.epoch + 1 or not np.array_equal(wanted, self.served):
            self.served, self.since = wanted, epoch
        self.epoch = epoch

    def release(self, slots: Sequence[int]) -> None:
        """Neither follow nor have nor answer for these any more."""
        for mask in (self.followed, self.whole, self.served):
            mask[list(slots)] = False
        self.changes += 1


def mask_of(slots: int, members: Iterable[int]) -> np.ndarray:
    """bool [slots], true for the members."""
    mask = np.zeros(slots, np.bool_)
    mask[list(members)] = True
    return mask
