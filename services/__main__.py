"""`python -m services up`: run the service in the foreground until SIGTERM or Ctrl-C.

Exit codes: 0 stopped by SIGTERM, 1 could not start, 2 wrong usage, 130 interrupted.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from index_builder.models.source import ModelMissing, ModelUnsupported
from services.config import Config, ConfigError, load
from services.data_dir import StartupError
from services.embedded import Embedded
from services.gateway.server import PortTaken
from services.metadata.store import StartupRefused

#: Whatever keeps a service from starting and is the operator's to mend.
MISHAPS = (StartupError, StartupRefused, PortTaken, ConfigError, ModelMissing, ModelUnsupported, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.cluster:
        print(
            "ringfort: --cluster is not in this release",
            file=sys.stderr,
        )
        return 2
    try:
        config = load(arguments.config, **_overrides(arguments))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, arguments.data_dir, as_json=arguments.json))
    except MISHAPS as error:
        print(f"ringfort: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


async def _serve(config: Config, data_dir: Path, *, as_json: bool) -> int:
    """Start, say so, wait for a signal, stop."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()

    def hear(code: int) -> None:
        if not told.done():
            told.set_result(code)

    loop.add_signal_handler(signal.SIGTERM, hear, 0)
    loop.add_signal_handler(signal.SIGINT, hear, 130)

    def say(words: str) -> None:
        print(f"ringfort: {words}", file=sys.stderr, flush=True)

    service = Embedded(config, data_dir, release=version("ringfort"), say=say)
    starting = asyncio.create_task(service.start())
    try:
        first: list[asyncio.Future[Any]] = [starting, told]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            addresses = starting.result()
            ready = {"ready": True, "grpc": addresses.grpc, "http": addresses.http, "pid": os.getpid()}
            if as_json:
                print(json.dumps(ready), flush=True)
            else:
                say(f"ready: gRPC on {addresses.grpc}, HTTP on {addresses.http}; Ctrl-C stops it")
        return await told
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await service.stop()


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
    up.add_argument("--cluster", action="store_true")
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings the command line names, by section."""
    named = {
        "gateway": {"grpc": arguments.grpc, "http": arguments.http, "insecure": arguments.insecure},
        "index": {"shards": arguments.shards, "replicas": arguments.replicas},
    }
    given = {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in named.items()
    }
    return {section: values for section, values in given.items() if values}


if __name__ == "__main__":
    sys.exit(main())
