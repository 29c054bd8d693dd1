"""The cluster's processes on Ray: nodes are actors, models are Ray Serve deployments.

Ray places, starts, restarts and scales them. It is not asked for any request: each process hosts its own gRPC
server on a thread with an event loop of its own, and joins the head. The only module that imports Ray.
"""

import asyncio
import hashlib
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from services.config import ClusterSettings
from services.embedder import scaling
from services.members import EmbedderNodeSettings, Member, MemberSettings, ShardNodeSettings, settings_from
from services.sibling import SiblingSettings

# Said to Ray by the environment only, and before it is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, ProxyLocation
from ray.serve.schema import LoggingConfig

log = logging.getLogger(__name__)

#: Memory for objects that processes share through Ray: we share none, and this is the least it takes.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
#: How many processes of models a Ray of our own has room for in place of one.
_MODELS_SHARE = 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: How soon Serve acts on queues that grow or shrink, and over how long it looks at them.
_INTERVAL_S, _LOOK_BACK_S, _UPSCALE_S, _DOWNSCALE_S = 2.0, 5.0, 5.0, 60.0
#: How long Serve lets a process's calls finish when it is ended.
_DRAIN_S = 10.0


class Hosted:
    """A member on a thread with an event loop of its own, in a process that Ray started.

    If it cannot be brought up the process ends, for Ray to start another: an actor whose constructor raises
    would never be tried again.
    """

    def __init__(self, settings: MemberSettings) -> None:
        self._member = Member(settings)
        self._loop = _event_loop()
        threading.Thread(target=self._loop.run_forever, name="member", daemon=True).start()
        try:
            self.address = self._run(self._member.start())
        except Exception:
            log.exception("%s cannot be brought up", settings.name)
            os._exit(1)

    def load(self) -> dict[str, float]:
        """See `Member.load`."""
        return dict(self._member.load())

    def stop(self) -> None:
        """See `Member.stop`."""
        self._run(self._member.stop())

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class MemberActor:
    """Hosts a node or a gateway for as long as it lives."""

    def __init__(self, settings: bytes) -> None:
        self._hosted = Hosted(settings_from(settings))

    def address(self) -> str:
        """Where it answers."""
        return str(self._hosted.address)

    def stop(self) -> None:
        """Let what runs finish."""
        self._hosted.stop()


class ModelReplica:
    """Hosts one process of a model; Serve scales and restarts it, and passes it no request."""

    def __init__(self, settings: bytes) -> None:
        given = settings_from(settings)
        self._hosted = Hosted(msgspec.structs.replace(given, name=f"{given.name}-{uuid4().hex[:8]}"))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy decides on."""
        return self._hosted.load()

    async def __del__(self) -> None:
        """Let calls under way finish: Serve knows of none."""
        await asyncio.to_thread(self._hosted.stop)

    async def __call__(self) -> None:
        """Serve wants something to call; nobody does."""


@dataclass(frozen=True, slots=True)
class _Resources:
    """What Ray sets aside for a process."""

    num_cpus: float
    num_gpus: float = 0.0
    #: Resources of the cluster's own making, by name.
    resources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, cpus: float, device: str) -> "_Resources":
        return cls(cpus, 1.0 if device.startswith("cuda") else 0.0)

    @classmethod
    def of_gateway(cls, settings: ClusterSettings) -> "_Resources":
        named = {} if settings.gateway_resource is None else {settings.gateway_resource: 1.0}
        return cls(settings.gateway_cpus, resources=named)


class RayLauncher:
    """Starts members on a Ray cluster: one that is named, or one of its own on this machine."""

    def __init__(self, settings: ClusterSettings, data_dir: Path) -> None:
        """data_dir: whose owner this is; what a killed predecessor left of a Ray of its own goes."""
        self._settings = settings
        name = hashlib.sha256(str(data_dir.absolute()).encode()).hexdigest()[:12]
        #: A short path, as sockets lie below it.
        self._scratch = Path(tempfile.gettempdir()) / f"ringfort-ray-{name}"
        self._nodes: list[Any] = []
        self._gateways: list[Any] = []
        self._ours = settings.ray_address is None

    async def start_nodes(self, nodes: Sequence[ShardNodeSettings]) -> None:
        """See Launcher."""
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            await asyncio.to_thread(self._connect)
        finally:
            # Ray's own handler would abort the process three seconds after the first signal to stop.
            for number, handler in handlers.items():
                signal.signal(number, handler)
        await asyncio.to_thread(self._start_nodes, nodes)

    async def start_gateways(self, gateways: Sequence[SiblingSettings]) -> None:
        """See Launcher."""
        resources = _Resources.of_gateway(self._settings)
        self._gateways += await asyncio.to_thread(_started, gateways, resources)

    async def stop_gateways(self) -> None:
        """See Launcher."""
        await asyncio.to_thread(_stopped, self._gateways)
        self._gateways.clear()

    async def start_model(self, model: str, settings: EmbedderNodeSettings) -> None:
        """See Launcher."""
        await asyncio.to_thread(self._start_model, model, settings)

    async def stop_model(self, model: str) -> None:
        """See Launcher."""
        await asyncio.to_thread(serve.delete, _application(model))

    async def close(self) -> None:
        """See Launcher."""
        await asyncio.to_thread(self._close)

    def _connect(self) -> None:
        settings = self._settings
        options: dict[str, Any] = {
            "namespace": "ringfort",
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if self._ours:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(mode=0o700)
            wanted = (
                settings.nodes * settings.node_cpus
                + settings.embedders_most * settings.embedder_cpus
                + (settings.gateways - 1) * settings.gateway_cpus
            )
            options |= {
                "address": "local",
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                # What we ask for has to fit; how much there really is the members find out for themselves.
                "num_cpus": max(os.cpu_count() or 1, int(wanted) + 2),
                "resources": {
                    name: share * settings.gateways
                    for name, share in _Resources.of_gateway(settings).resources.items()
                },
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": str(self._scratch),
            }
        else:
            options["address"] = settings.ray_address
        ray.init(**options)
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=LoggingConfig(log_level="ERROR"))

    def _start_nodes(self, nodes: Sequence[ShardNodeSettings]) -> None:
        for node in nodes:
            self._nodes += _started([node], _Resources.of(self._settings.node_cpus, node.device))

    def _start_model(self, model: str, settings: EmbedderNodeSettings) -> None:
        cluster = self._settings
        # On a Ray of our own the processes of a model share what there is, as they would in one process; how
        # many models there are at a time is bounded by their bytes.
        share = 1 / _MODELS_SHARE if self._ours else 1.0
        resources = _Resources.of(share * cluster.embedder_cpus, settings.device)
        deployment = serve.deployment(
            name="model",
            ray_actor_options={"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
            graceful_shutdown_timeout_s=_DRAIN_S,
            health_check_period_s=2.0,
            autoscaling_config=AutoscalingConfig(
                min_replicas=cluster.embedders,
                max_replicas=max(cluster.embedders, cluster.embedders_most),
                metrics_interval_s=_INTERVAL_S,
                look_back_period_s=_LOOK_BACK_S,
                upscale_delay_s=_UPSCALE_S,
                downscale_delay_s=_DOWNSCALE_S,
                policy=AutoscalingPolicy(policy_function=scaling.policy),
            ),
        )(ModelReplica)
        serve.run(
            deployment.bind(msgspec.json.encode(settings)),
            name=_application(model),
            route_prefix=None,
            blocking=False,
        )

    def _close(self) -> None:
        if not ray.is_initialized():
            return
        _stopped(self._gateways)
        _stopped(self._nodes)
        if self._ours:
            serve.shutdown()
        ray.shutdown()
        if self._ours:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _started(members: Sequence[MemberSettings], resources: _Resources) -> list[Any]:
    """Actors that host these, restarted for ever and on as many machines as there are."""
    return [
        ray.remote(MemberActor)
        .options(
            name=member.name,
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            resources=dict(resources.resources),
            max_restarts=-1,
            scheduling_strategy="SPREAD",
        )
        .remote(msgspec.json.encode(member))
        for member in members
    ]


def _stopped(actors: Sequence[Any]) -> None:
    try:
        ray.get([actor.stop.remote() for actor in actors], timeout=_DRAIN_S)
    except Exception as error:  # one that is restarting has nothing to finish
        log.warning("a process was not stopped in order: %s", error)
    for actor in actors:
        ray.kill(actor)


def _application(model: str) -> str:
    return "ringfort-" + re.sub(r"[^A-Za-z0-9-]", "-", model)


def _event_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
