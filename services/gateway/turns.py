"""Long work on the event loop, in pieces, so that what is short need not wait for the end of it."""

import asyncio


class Turns:
    """Lets long pieces of work into the event loop one at a time, whoever they are for.

    Ten batches that are checked side by side would otherwise each take a piece of every turn, and a search
    would wait for ten pieces at each of its own.
    """

    def __init__(self) -> None:
        self._next = asyncio.Lock()

    async def next(self) -> None:
        """Before the next piece: the event loop does everything else that is ready, and others go first."""
        async with self._next:
            await asyncio.sleep(0)
