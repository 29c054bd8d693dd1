"""`python -m services up`: run the service in the foreground until SIGTERM or Ctrl-C.

`python -m services member`: run one process of a cluster, described by a JSON object on stdin (members.py).

Exit codes: 0 stopped by SIGTERM or SIGHUP, 1 could not start, 2 wrong usage, 130 interrupted.
"""

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from services.config import Config
    from services.embedded import Embedded

#: What a signal makes of the exit code.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    # The terminal was closed, and nohup did not ask to outlive it.
    EXIT_CODES[signal.SIGHUP] = 0
#: Objects made, less those freed, between two runs of the garbage collector; a few batches' worth.
GARBAGE_OBJECTS = 50_000
#: How long a thread that runs Python may keep one that waits for the interpreter: the default of 5 ms is more
#: than a search takes, and a search needs it anew after every call of FAISS.
SWITCH_S = 0.001


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = _parser().parse_args(argv)
    # Else gRPC starts its threads anew in every child between fork and exec, and now and then crashes it.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # The service has threads of its own for every core; a second set inside numpy only gets in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    if arguments.command == "member":
        return _member()
    # Ray warns on stdout, where whoever started this reads one line of JSON.
    said = _reserved_stdout() if arguments.json else None

    from services.config import ConfigError, load

    try:
        config = load(arguments.config, **_overrides(arguments))
    except ConfigError as error:
        return _failed(error)

    # Here, for they take a second, in which signals have to be heard already.
    import uvloop

    from index_builder.models.build import ModelInaccurate
    from index_builder.models.source import ModelMissing, ModelUnsupported
    from services.data_dir import StartupError
    from services.embedded import Embedded
    from services.gateway.server import PortTaken
    from services.metadata.store import StartupRefused
    from shard_router.errors import RingfortError

    try:
        service = Embedded(config, arguments.data_dir, release=version("ringfort"), say=_say)
        if arguments.cluster:
            service = _cluster(config, arguments.data_dir)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(service, said))
    except (
        # Whatever keeps a service from starting and is the operator's to mend.
        StartupError, StartupRefused, PortTaken, ModelMissing, ModelUnsupported, ModelInaccurate,
        RingfortError, OSError,
    ) as error:  # fmt: skip
        return _failed(error)


def _cluster(config: "Config", data_dir: Path) -> "Embedded":
    """The service spread over processes; StartupError without Ray where that is to start them."""
    from services.cluster import Cluster, Launcher
    from services.data_dir import StartupError
    from services.processes import ProcessLauncher

    launcher: Launcher
    if config.cluster.launcher == "processes":
        launcher = ProcessLauncher(embedders=config.cluster.embedders)
        return Cluster(config, data_dir, launcher, release=version("ringfort"), say=_say)
    try:
        # Nothing else may import it: it takes a second, and the other composition does without.
        from services.on_ray import RayLauncher
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--cluster needs Ray ({error.name} is missing); run: pip install 'ringfort[cluster]'"
        ) from None
    launcher = RayLauncher(config.cluster, data_dir)
    return Cluster(config, data_dir, launcher, release=version("ringfort"), say=_say)


def _member() -> int:
    """Run one process of a cluster; says where it answers, and stops on a signal or when stdin is closed."""
    import msgspec
    import uvloop

    from services.members import Member, settings_from
    from shard_router.errors import RingfortError

    async def serve(member: Member) -> int:
        told = _signals()
        asyncio.get_running_loop().add_reader(0, _hear_the_end, told)
        try:
            ready = {"ready": True, "address": await member.start(), "pid": os.getpid()}
            if member.serves_callers:
                _ready_for_callers()
            print(json.dumps(ready), flush=True)
            return await told
        finally:
            await member.stop()

    settings = _first_line(0)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(Member(settings_from(settings))))
    except (msgspec.ValidationError, RingfortError, OSError) as error:
        return _failed(error)


def _first_line(descriptor: int) -> bytes:
    """A line of it, and nothing beyond: what follows is for the event loop to hear."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def _hear_the_end(told: "asyncio.Future[int]") -> None:
    if not os.read(0, 4_096):
        asyncio.get_running_loop().remove_reader(0)
        if not told.done():
            told.set_result(0)


def _signals() -> "asyncio.Future[int]":
    """The exit code, once a signal came that asks to stop."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()

    def hear(code: int) -> None:
        if not told.done():
            told.set_result(code)

    for number, code in EXIT_CODES.items():
        loop.add_signal_handler(number, hear, code)
    return told


def _failed(error: Exception) -> int:
    _say(" ".join(str(error).split()))
    return 1


def _reserved_stdout() -> TextIO:
    """Stdout for what is said here alone; what else writes to it, in any language, writes to stderr now."""
    reserved = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return reserved


async def _serve(service: "Embedded", said: TextIO | None) -> int:
    """Start, say so (as JSON where there is something to write it to), wait for a signal, stop."""
    told = _signals()
    starting = asyncio.create_task(service.start())
    try:
        first: list[asyncio.Future[Any]] = [starting, told]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            addresses = starting.result()
            _ready_for_callers()
            ready = {"ready": True, "grpc": addresses.grpc, "http": addresses.http, "pid": os.getpid()}
            if said is not None:
                print(json.dumps(ready), file=said, flush=True)
            else:
                _say(f"ready: gRPC on {addresses.grpc}, HTTP on {addresses.http}; Ctrl-C stops it")
        return await told
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await service.stop()


def _ready_for_callers() -> None:
    """What the start has made stays: the garbage collector need not walk over it again and again.

    It would, as documents come in by the thousand; that took a tenth of the time of ingest.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    sys.setswitchinterval(SWITCH_S)


def _say(words: str) -> None:
    print(f"ringfort: {words}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringfort", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="run the service in the foreground")
    up.add_argument("--data-dir", type=Path, default=Path("ringfort-data"))
    up.add_argument("--grpc", metavar="HOST:PORT")
    up.add_argument("--http", metavar="HOST:PORT")
    up.add_argument("--shards", type=int)
    up.add_argument("--replicas", type=int)
    up.add_argument("--config", type=Path)
    up.add_argument("--insecure", action="store_true", default=None)
    up.add_argument("--json", action="store_true")
    up.add_argument(
        "--cluster", action="store_true", help="shards and models in processes of their own, on Ray"
    )
    up.add_argument("--nodes", type=int, help="with --cluster: nodes that hold shards")
    up.add_argument("--gateways", type=int, help="with --cluster: gateways behind the same ports")
    up.add_argument("--ray-address", help="with --cluster: an existing Ray cluster")
    commands.add_parser("member", help="run one process of a cluster, described on stdin")
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings the command line names, by section."""
    named = {
        "gateway": {"grpc": arguments.grpc, "http": arguments.http, "insecure": arguments.insecure},
        "index": {"shards": arguments.shards, "replicas": arguments.replicas},
        "cluster": {
            "nodes": arguments.nodes,
            "gateways": arguments.gateways,
            "ray_address": arguments.ray_address,
        },
    }
    given = {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in named.items()
    }
    return {section: values for section, values in given.items() if values}


def _leave(number: int, frame: object) -> None:
    # Not by an exception: raised within the start of an extension module, it would come out as another.
    os._exit(EXIT_CODES[signal.Signals(number)])


if __name__ == "__main__":
    for _number in EXIT_CODES:
        # Until there is an event loop to hear them; before that there is nothing to be stopped.
        signal.signal(_number, _leave)
    sys.exit(main())
