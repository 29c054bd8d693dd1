"""Replicas of a log in memory, closed when a test is over."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from memory_log import MemoryLog, collection

from services.shard.replica import Replica
from shard_router.model import AttributeType, Metric

SCHEMA = {"rank": AttributeType.INT, "name": AttributeType.KEYWORD}
Open = Callable[..., Awaitable[Replica]]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(3)


@pytest.fixture
async def open_replica(tmp_path: Path, log: MemoryLog, threads: ThreadPoolExecutor) -> AsyncIterator[Open]:
    opened: list[Replica] = []

    async def open_one(**changed: Any) -> Replica:
        options: dict[str, Any] = {
            "directory": tmp_path / "shard-0", "log_id": log.log_id,
            "tail": lambda after, *slots: log.tail(after, *slots),
            "search_threads": threads, "memtable_rows": 8, "poll_ms": 5, "tail_rows": log.page_rows,
        }  # fmt: skip
        metric = changed.pop("metric", Metric.COSINE)
        space = changed.pop("space", None)
        made = collection(schema=SCHEMA, metric=metric)
        if space is not None:
            object.__setattr__(made, "space", space)
        opened.append(await Replica.open(made, **{**options, **changed}))
        return opened[-1]

    yield open_one
    for replica in opened:
        await replica.close()
