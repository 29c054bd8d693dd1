"""A Ray cluster that runs already, of three machines: the head's, one for gateways, one for all else.

That is how it is on Kubernetes, where a Service selects the pods that have a gateway.
"""

import contextlib
import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest
from command_line import eventually
from up import Up, end

from ringfort import Client
from services.servers.child import free_port

pytestmark = pytest.mark.skipif(
    os.environ.get("COMPOSITION") != "ray", reason="needs Ray; make test-cluster runs it"
)
_OBJECTS_BYTES = 80 * 1024 * 1024
_UP_WITHIN_S, BACK_WITHIN_S = 60.0, 90.0


class Machines:
    """Ray's processes, which take each other for machines; all ask for one token."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"127.0.0.1:{free_port(random.Random())}"
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def start(self, name: str, *options: str) -> None:
        """One more, once it has joined; the first is the head."""
        place = ["--address", self.address]
        if not self._running:
            ports = [
                "--port",
                self.address.rpartition(":")[2],
                "--ray-client-server-port",
                str(free_port(random.Random())),
            ]
            place = ["--head", *ports, "--include-dashboard=false", f"--temp-dir={self._directory}"]
        told = self._directory / f"{name}.log"
        with told.open("wb") as out:
            self._running[name] = process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats",
                    f"--object-store-memory={_OBJECTS_BYTES}", *place, *options,
                ],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

        def joined() -> bool:
            assert process.poll() is None, told.read_text()
            return b"Ray runtime started" in told.read_bytes()

        eventually(joined, _UP_WITHIN_S)

    def of(self, pid: int) -> str:
        """The machine that a process runs on."""
        above = {each.pid for each in psutil.Process(pid).parents()}
        [name] = [name for name, process in self._running.items() if process.pid in above]
        return name

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            end(process)


@pytest.fixture
def machines() -> Iterator[Machines]:
    # Sockets lie below it, and their paths have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        machines = Machines(Path(directory))
        try:
            machines.start("head", "--num-cpus=0")
            machines.start("worker", "--num-cpus=4")
            machines.start("front", "--num-cpus=0", '--resources={"ringfort_gateway": 1}')
            yield machines
        finally:
            machines.stop()


@pytest.fixture
def service(data_dir: Path, machines: Machines) -> Iterator[Up]:
    env = {
        "RINGFORT_CLUSTER__GATEWAY_CPUS": "0",
        "RINGFORT_CLUSTER__GATEWAY_RESOURCE": "ringfort_gateway",
        **machines.env,
    }
    up = Up.start(
        data_dir, "--cluster", "--ray-address", machines.address, "--nodes", "2", "--gateways", "2",
        env=env, ready_within_s=240,
    )  # fmt: skip
    yield up
    if up.process.poll() is None:
        assert up.stop() == 0
    end(up.process)


def processes(client: Client) -> Mapping[str, tuple[int, str]]:
    """Those beside the head that are there: by name their ids, and where a gateway alone answers HTTP."""
    return {
        each.name: (int(each.detail.split()[1]), each.detail.partition("http://")[2])
        for each in client.cluster().components
        if each.detail.startswith("pid ") and each.name != "gateway head"
    }


@pytest.mark.timeout(600)
def test_gateways_run_where_their_resource_is_and_nothing_else_does(service: Up, machines: Machines) -> None:
    with Client(service.grpc, timeout_s=60) as client:
        at = {name: machines.of(pid) for name, (pid, _) in processes(client).items()}
        gateways = {name for name in at if name.startswith("gateway ")}
        assert gateways == {"gateway gateway-1"}
        assert {at[name] for name in gateways} == {"front"}
        assert len(at) >= 4
        assert {at[name] for name in at.keys() - gateways} == {"worker"}

        client.create_collection("notes")
        client.upsert("notes", [{"id": "json", "text": "a fast parser for JSON"}])

        def found_by(gateway: str) -> bool:
            asked = {"collection": "notes", "text": "json"}
            answer = httpx.post(f"http://{gateway}/v1/search", json=asked, timeout=30)
            return answer.status_code == 200 and [hit["id"] for hit in answer.json()["hits"]] == ["json"]

        pid, http = processes(client)["gateway gateway-1"]
        eventually(lambda: found_by(http), BACK_WITHIN_S)
        psutil.Process(pid).kill()

    with Client(service.grpc, timeout_s=60) as client:

        def again() -> str:
            now = processes(client).get("gateway gateway-1", (pid, ""))
            return now[1] if now[0] != pid and machines.of(now[0]) == "front" else ""

        http = eventually(again, BACK_WITHIN_S)
        assert found_by(http)
        pids = [pid for pid, _ in processes(client).values()]
    assert service.stop() == 0
    eventually(lambda: not any(map(psutil.pid_exists, pids)), BACK_WITHIN_S)
