"""One service for the session, reached as its users reach it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import grpc
import httpx
import pytest
from partitions import lend_partitions
from rpc import Rpc
from scrape import Scrape
from up import Up, lend_model

from ringfort import Client
from ringfort.errors import NotFound

#: Small enough for a test's collection to be sealed into segments, and for its answers to leave L1.
SETTINGS = {"RINGFORT_SHARD__MEMTABLE_ROWS": "500", "RINGFORT_CACHE__L1_BYTES": str(4 * 1024 * 1024)}

#: `up`'s options for the composition under test: embedded, or COMPOSITION=processes or ray, with GATEWAYS=2.
COMPOSITION: tuple[str, ...] = ()
if launcher := os.environ.get("COMPOSITION"):
    COMPOSITION = ("--cluster", "--gateways", os.environ.get("GATEWAYS", "2"))
    SETTINGS["RINGFORT_CLUSTER__LAUNCHER"] = launcher
#: SERVER=native runs the same tests against the other gRPC server.
if server := os.environ.get("SERVER"):
    SETTINGS["RINGFORT_GATEWAY__SERVER"] = server


@pytest.fixture(scope="session")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: Path
) -> Iterator[Up]:
    """The service all tests share; whoever stops it starts one of their own.

    Nothing that is asked of it, however wrong, may be an error of its own.
    """
    data_dir = tmp_path_factory.mktemp("e2e") / "data"
    lend_model(model_dir, data_dir)
    with lend_partitions(request) as partitions:
        up = Up.start(data_dir, *COMPOSITION, env=SETTINGS | partitions, ready_within_s=240)
        yield up
        assert up.stop() == 0
    assert up.errors() == []


@pytest.fixture(scope="session")
def client(service: Up) -> Iterator[Client]:
    """The Python client of the shared service."""
    with Client(service.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def channel(service: Up) -> Iterator[grpc.Channel]:
    """A bare channel to the shared service, for what the Python client would not send."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(service.grpc, options) as channel:
        yield channel


@pytest.fixture(scope="session")
def rpc(channel: grpc.Channel) -> Rpc:
    """The shared service, message by message."""
    return Rpc.on(channel)


@pytest.fixture(scope="session")
def web(service: Up) -> Iterator[httpx.Client]:
    """The HTTP face of the shared service."""
    with httpx.Client(base_url=f"http://{service.http}", timeout=30.0) as web:
        yield web


@pytest.fixture(scope="session")
def scrape(service: Up, client: Client) -> Scrape:
    """The figures of the shared service."""
    return Scrape(service, client)


@pytest.fixture
def make_collection(client: Client) -> Iterator[Callable[..., str]]:
    """Makes collections from `create_collection`'s options and gives their names; they go after the test."""
    names: list[str] = []

    def make(**options: object) -> str:
        name = f"c-{uuid4().hex[:12]}"
        client.create_collection(name, **options)
        names.append(name)
        return name

    yield make
    for name in names:
        try:
            client.delete_collection(name)
        except NotFound:
            pass


@pytest.fixture
def collection(make_collection: Callable[..., str]) -> str:
    """An empty collection of the default model, with an attribute of every type."""
    return make_collection(
        attributes={
            "name": "keyword",
            "rank": "int",
            "share": "float",
            "free": "bool",
            "released": "timestamp",
            "tags": "keywords",
        }
    )
