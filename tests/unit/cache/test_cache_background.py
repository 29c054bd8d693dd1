import asyncio

from services.cache.background import start


async def test_a_failure_is_in_the_log(caplog):
    async def work() -> None:
        raise RuntimeError("what went wrong")

    await asyncio.wait([start(work())])
    assert "what went wrong" in caplog.text
