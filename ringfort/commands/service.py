"""`up` and `demo`: running the service."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringfort.commands.options import Json


def up_command(*args: str) -> list[str]:
    """The command line of the service's own process."""
    # -P: a `services` in the user's working directory is not ours.
    return [sys.executable, "-P", "-m", "services", "up", *args]


def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything is kept; made when absent.", show_default="./ringfort-data"),
    ] = None,
    grpc: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where gRPC listens.", show_default="127.0.0.1:7700"),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where HTTP listens.", show_default="127.0.0.1:7780"),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Shards of a new collection.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Replicas of each shard of a new collection.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings, as YAML.")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Run shards and models in processes of their own, on Ray.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --cluster: nodes that hold shards.")
    ] = None,
    gateways: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --cluster: gateways behind the same ports.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="With --cluster: an existing Ray cluster.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Say where it listens in one line of JSON, once it is ready.")
    ] = False,
) -> None:
    """Run the service in the foreground, with the Postgres and the cache it needs.

    Port 0 picks a free one. SIGTERM or Ctrl-C drains it and stops everything it started.
    """
    given: dict[str, object] = {
        "--data-dir": data_dir,
        "--grpc": grpc,
        "--http": http,
        "--shards": shards,
        "--replicas": replicas,
        "--config": config,
        "--nodes": nodes,
        "--gateways": gateways,
        "--ray-address": ray_address,
    }
    args = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    args += [
        flag
        for flag, wanted in (("--cluster", cluster), ("--insecure", insecure), ("--json", json))
        if wanted
    ]
    os.execv(sys.executable, up_command(*args))


def demo(
    data_dir: Annotated[
        Path, typer.Option(help="Where the demo keeps its data; a later run reuses it.")
    ] = Path("ringfort-data/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running afterwards.")] = False,
    json: Json = False,
) -> None:
    """See it work: start a service, load the most downloaded packages of PyPI, and search them."""
    from ringfort.demo import Demo

    Demo(data_dir, keep=keep, json=json).run()
