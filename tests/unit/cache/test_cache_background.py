import asyncio

from services.cache.background import end, start


async def test_a_task_that_loses_its_cancellation_still_ends():
    lost = 0

    async def work() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if lost == 2:
                    raise
                lost += 1

    task = start(work())
    await asyncio.sleep(0)
    await end([task])
    assert task.cancelled()
    assert lost == 2


async def test_a_failure_is_in_the_log(caplog):
    async def work() -> None:
        raise RuntimeError("what went wrong")

    task = start(work())
    await asyncio.wait([task])
    await end([task])
    assert "what went wrong" in caplog.text


async def test_what_has_ended_already_is_left_alone():
    async def work() -> None:
        return

    task = start(work())
    await task
    await end([task])
    assert not task.cancelled()
