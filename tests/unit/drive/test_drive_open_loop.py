"""What closed loops hide shows: a server that pauses is paid for by every call that was due meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from loadtests.drive import arrivals
from loadtests.drive.open_loop import Due, OpenLoop
from loadtests.drive.tally import NOT_SENT, OK, UNANSWERED, Tallies


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while something runs and jumps to the next timer otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        select = self._selector.select

        def jump(timeout: float | None) -> list[Any]:
            self.now_s += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.now_s


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())


class PausingServer:
    """Answers after a millisecond, one call after another; stands still from `at_s` for `for_s`."""

    def __init__(self, at_s: float, for_s: float) -> None:
        self._at_s, self._for_s = at_s, for_s

    async def answer(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._at_s <= now_s < self._at_s + self._for_s:
            await asyncio.sleep(self._at_s + self._for_s - now_s)
        await asyncio.sleep(0.001)


async def offered(
    answer: Callable[[], Awaitable[object]],
    *,
    rate: float,
    seconds: float,
    tallies: Tallies,
    drain_s: float = 10.0,
    **bounds: Any,
) -> None:
    loop = asyncio.get_running_loop()

    def due(at_s: float) -> Due:
        return "call", answer

    limits = {"max_in_flight": 10_000, "max_waiting": 10_000} | bounds
    open_loop = OpenLoop(
        due, tallies, began_s=0.0, clock=loop.time, code_of=lambda error: type(error).__name__, **limits
    )
    for at_s in arrivals.schedule(arrivals.constant(), arrivals.pieces(seconds, rate)):
        loop.call_at(at_s, open_loop.launch, at_s)
    await asyncio.sleep(seconds)
    await open_loop.drain(drain_s)


@pytest.mark.parametrize("bound", [10_000, 8])
def test_a_pause_of_one_second_in_ten_shows_in_a_tenth_of_the_calls(bound: int) -> None:
    async def work() -> None:
        tallies = Tallies()
        await offered(
            PausingServer(4.0, 1.0).answer, rate=100, seconds=10, tallies=tallies, max_in_flight=bound
        )
        call = tallies.of("call")
        assert call.codes == {OK: 1_000}
        # Those due within the pause waited for what was left of it: 0 to 1 s, evenly.
        assert call.latency.quantile_ms(50) == pytest.approx(1, rel=0.01)
        assert call.latency.quantile_ms(90) < 20
        assert call.latency.quantile_ms(95) == pytest.approx(500, rel=0.05)
        assert call.latency.quantile_ms(99) == pytest.approx(900, rel=0.05)
        assert call.latency.quantile_ms(100) == pytest.approx(1_000, rel=0.02)
        assert tallies.seconds[4].latency.quantile_ms(50) == pytest.approx(500, rel=0.05)
        assert tallies.seconds[7].latency.quantile_ms(100) < 2

    run(work)


def test_a_closed_loop_would_have_hidden_it() -> None:
    """The same server and the same pause: one caller meets it once, and the p99 says nothing of it."""

    async def work() -> None:
        server, loop = PausingServer(4.0, 1.0), asyncio.get_running_loop()
        took: list[float] = []
        while loop.time() < 10:
            began = loop.time()
            await server.answer()
            took.append(loop.time() - began)
        assert sorted(took)[int(len(took) * 0.99)] < 0.002
        assert max(took) > 0.9

    run(work)


def test_what_is_never_answered_and_what_is_never_sent_is_counted() -> None:
    async def work() -> None:
        tallies = Tallies()
        never = asyncio.get_running_loop().create_future

        async def silent() -> None:
            await never()

        await offered(
            silent, rate=10, seconds=1, tallies=tallies, drain_s=2.0, max_in_flight=3, max_waiting=4
        )
        assert tallies.of("call").codes == {UNANSWERED: 3, NOT_SENT: 7}
        assert tallies.of("call").failed_share == 1
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)

    run(work)


def test_failures_are_counted_by_code_and_their_time_counts() -> None:
    async def work() -> None:
        tallies = Tallies()

        async def fails() -> None:
            await asyncio.sleep(0.2)
            raise ValueError

        await offered(fails, rate=10, seconds=1, tallies=tallies)
        assert tallies.of("call").codes == {"ValueError": 10}
        assert tallies.of("call").latency.quantile_ms(50) == pytest.approx(200, rel=0.01)
        assert tallies.seconds[0].failed == 10

    run(work)


def test_the_warm_up_is_made_and_not_counted() -> None:
    async def work() -> None:
        tallies = Tallies()
        made = 0

        async def call() -> None:
            nonlocal made
            made += 1

        await offered(call, rate=10, seconds=3, tallies=tallies, counted_from_s=1.0)
        assert made == 30
        assert tallies.of("call").calls == 20
        assert min(tallies.seconds) == 0

    run(work)
