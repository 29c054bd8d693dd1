"""Both sides of each endpoint: the part in this process, and the same part behind a node's port."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from memory_log import MemoryLog, collection
from sides import SCHEMA, OpenShard

from index_builder.models.build import ensure_model
from protos.ringfort.internal.v1 import embedder_node_pb2, shard_node_pb2
from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeStub
from protos.ringfort.internal.v1.shard_node_pb2_grpc import ShardNodeStub
from services.embedder.embedder import Embedder
from services.embedder.node import EmbedderNode
from services.embedder.onnx_model import OnnxModel
from services.gateway.endpoints import EmbedderEndpoint, ShardEndpoint
from services.gateway.remote_embedder import RemoteEmbedder, Replicas
from services.gateway.remote_shard import RemoteShard
from services.peers import Peer, Port
from services.shard.local_shards import LocalShards
from services.shard.node import ShardNode

TOKEN = "only-here"
SHARD_SERVICE = shard_node_pb2.DESCRIPTOR.services_by_name["ShardNode"]
EMBEDDER_SERVICE = embedder_node_pb2.DESCRIPTOR.services_by_name["EmbedderNode"]


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(3)


@pytest.fixture
async def shards(tmp_path: Path, log: MemoryLog) -> AsyncIterator[LocalShards]:
    with ThreadPoolExecutor(2) as threads:
        yield LocalShards(
            tmp_path,
            lambda *_: lambda after, *slots: log.tail(after, *slots),
            search_threads=threads,
            memtable_rows=8,
            graph_rows=50_000,
            poll_ms=20,
            device="cpu",
        )


@pytest.fixture(params=["in-process", "grpc"])
async def open_shard(
    request: pytest.FixtureRequest, shards: LocalShards, log: MemoryLog
) -> AsyncIterator[OpenShard]:
    """Opens the collection's one shard; what was opened is closed after the test."""
    options: dict[str, Any] = {"slots": range(16), "epoch": 1, "log_id": log.log_id}
    made = collection(schema=SCHEMA)
    async with AsyncExitStack() as stack:
        opening: Callable[[], Awaitable[Any]]
        if request.param == "in-process":
            opening = lambda: shards.open(made, 0, 0, **options)  # noqa: E731
        else:
            node = ShardNode(shards)
            stack.push_async_callback(node.close)
            port = Port({SHARD_SERVICE: node}, TOKEN)
            stack.push_async_callback(port.stop, 0)
            peer = Peer("node-0", ShardNodeStub, TOKEN)
            stack.push_async_callback(peer.close)
            peer.move(await port.start())
            opening = lambda: RemoteShard.open(peer, made, 0, 0, **options)  # noqa: E731

        async def open_one() -> ShardEndpoint:
            endpoint: ShardEndpoint = await opening()
            stack.push_async_callback(endpoint.close)
            return endpoint

        yield open_one


@pytest.fixture(scope="session")
def model(model_dir: Path) -> OnnxModel:
    return OnnxModel.load(ensure_model(model_dir), threads=1)


@pytest.fixture(params=["in-process", "grpc"])
async def embedder(request: pytest.FixtureRequest, model: OnnxModel) -> AsyncIterator[EmbedderEndpoint]:
    async with AsyncExitStack() as stack:
        embedder = Embedder(model, workers=1, queue_texts=64)
        stack.push_async_callback(embedder.close)
        if request.param == "in-process":
            yield embedder
            return
        port = Port({EMBEDDER_SERVICE: EmbedderNode(embedder)}, TOKEN)
        stack.push_async_callback(port.stop, 0)
        peer = Peer("embedder-0", EmbedderNodeStub, TOKEN)
        peer.move(await port.start())
        replicas = Replicas(model.manifest.model, random.Random(1))
        replicas.join("embedder-0", peer)
        remote = RemoteEmbedder(model.manifest, replicas, replicas.close)
        stack.push_async_callback(remote.close)
        yield remote
