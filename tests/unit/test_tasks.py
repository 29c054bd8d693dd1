import asyncio

from services.tasks import end


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

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await end(task, None)
    assert task.cancelled()
    assert lost == 2


async def test_what_has_ended_already_is_left_alone():
    async def work() -> None:
        return

    task = asyncio.create_task(work())
    await task
    await end(task)
    assert not task.cancelled()
