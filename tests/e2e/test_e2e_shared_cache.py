"""Two services on one Redis: what both are asked for at the same time one of them computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from up import Up, lend_model
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client


@pytest.fixture
def two(tmp_path: Path, model_dir: Path, valkey_url: str) -> Iterator[list[Up]]:
    """They know of each other."""
    services: list[Up] = []
    try:
        for name in ("one", "other"):
            lend_model(model_dir, tmp_path / name)
            services.append(Up.start(tmp_path / name, env={"RINGFORT_CACHE__REDIS_URL": valkey_url}))
        for service in services:
            eventually(lambda service=service: figure(service, "ringfort_cache_other_gateways") >= 1)
        yield services
    finally:
        for service in services:
            assert service.stop() == 0


def figure(service: Up, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = httpx.get(f"http://{service.http}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_a_text_is_embedded_once_and_batches_find_what_they_look_for(two: list[Up]) -> None:
    texts = [f"text {i} of {uuid4()}" for i in range(64)]
    before = sum(figure(service, "ringfort_model_texts_total") for service in two)
    with Client(two[0].grpc) as one, Client(two[1].grpc) as other, ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(client.embed, texts) for _ in range(4) for client in (one, other)]
        vectors = [call.result().tobytes() for call in calls]
        assert len(set(vectors)) == 1
        assert sum(figure(service, "ringfort_model_texts_total") for service in two) == before + len(texts)

        one.create_collection("shared")
        one.upsert("shared", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)], wait="VISIBLE")
        asked = [*texts, texts[0]]
        searches = [threads.submit(one.batch_search, "shared", texts=asked, k=1) for _ in range(4)]
        found = [search.result() for search in searches]
        found.append(one.batch_search("shared", texts=asked, k=1))
        for result in found:
            assert [ids[0] for ids in result.ids] == [f"d{i}" for i in range(len(texts))] + ["d0"]
        assert found[-1].served_from in (pb.ServedFrom.Name(pb.L1), pb.ServedFrom.Name(pb.REDIS))
        assert sum(figure(service, "ringfort_cache_lease_waiting") for service in two) == 0
