import asyncio

from services.gateway.turns import Turns


async def test_one_piece_a_turn_whoever_it_is_for_and_everybody_gets_there() -> None:
    turns, turn, done = Turns(), 0, False
    pieces: list[tuple[int, str]] = []

    async def count() -> None:
        nonlocal turn
        while not done:
            turn += 1
            await asyncio.sleep(0)

    async def work(name: str) -> None:
        for _ in range(5):
            await turns.next()
            pieces.append((turn, name))

    counting = asyncio.create_task(count())
    await asyncio.gather(*(work(name) for name in "abc"))
    done = True
    await counting
    assert len({at for at, _ in pieces}) == len(pieces) == 15
    assert [name for _, name in pieces] == list("abc" * 5)


async def test_who_leaves_holds_nobody_up() -> None:
    turns = Turns()
    leaving, staying = asyncio.create_task(turns.next()), asyncio.create_task(turns.next())
    await asyncio.sleep(0)
    leaving.cancel()
    async with asyncio.timeout(30):
        await staying
