"""`top` and `profile`: watching a service at work."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ringfort.commands.options import Json, Server


class Form(StrEnum):
    """How a profile is drawn."""

    FLAMEGRAPH = "flamegraph"
    SPEEDSCOPE = "speedscope"


def top(
    http: Annotated[
        str | None,
        typer.Option(
            envvar="RINGFORT_HTTP", metavar="HOST:PORT", help="The service's HTTP face.",
            show_default="127.0.0.1:7780",
        ),
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often it is looked.")] = 2.0,
    times: Annotated[
        int, typer.Option("-n", min=0, metavar="N", help="Look so often and end; 0 goes on.")
    ] = 0,
    json: Json = False,
) -> None:  # fmt: skip
    """Watch a service: calls, stages, queues and caches, as they are now."""
    from rich.live import Live

    from ringfort import terminal
    from ringfort import top as view
    from ringfort.scrape import DEFAULT_HTTP, Between, fetch

    address = http or DEFAULT_HTTP
    out, before, looked = terminal.console(), fetch(address), 0
    # A live table on a terminal; one below the other where there is none.
    live = Live(console=out, auto_refresh=False, screen=times == 0) if out.is_terminal and not json else None
    if live:
        live.start()
    try:
        while not times or looked < times:
            time.sleep(every)
            after = fetch(address)
            between, before, looked = Between(before, after), after, looked + 1
            if json:
                terminal.print_json(view.told(between))
            elif live:
                live.update(view.shown(between), refresh=True)
            else:
                out.print(view.shown(between))
    finally:
        if live:
            live.stop()


def profile(
    seconds: Annotated[int, typer.Option(min=1, max=3600, metavar="N", help="For how long.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it goes.", show_default="profile-PID.svg"),
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="How it is drawn.")] = Form.FLAMEGRAPH,
    native: Annotated[
        bool, typer.Option("--native", help="Also the C of FAISS, ONNX Runtime and gRPC; slower.")
    ] = False,
    pid: Annotated[
        int | None,
        typer.Option(
            metavar="PID", help="A process of this machine.", show_default="that listens at --server"
        ),
    ] = None,
    server: Server = None,
    json: Json = False,
) -> None:
    """Sample a service of this machine with py-spy, all threads, and draw where its time goes."""
    from ringfort import terminal
    from ringfort.channel import server_address
    from ringfort.errors import FailedPrecondition

    process = pid or _listening(server_address(server))
    path = out or Path(f"profile-{process}.{'svg' if form is Form.FLAMEGRAPH else 'json'}")
    told = subprocess.run(
        [_py_spy(), "record", "--pid", str(process), "--duration", str(seconds), "--output", str(path),
         "--format", form, "--threads", *(["--native"] if native else [])],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + 120,
    )  # fmt: skip
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise FailedPrecondition(f"py-spy cannot sample process {process}: {last}")
    if json:
        terminal.print_json({"profile": str(path), "pid": process, "seconds": seconds})
    else:
        terminal.console().print(f"{path}: {seconds} s of process {process}", soft_wrap=True)


def _py_spy() -> str:
    from ringfort.errors import FailedPrecondition

    beside = Path(sysconfig.get_path("scripts")) / "py-spy"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")
    if found is None:
        raise FailedPrecondition(
            f"py-spy is not installed: {Path(sys.executable).name} -m pip install 'ringfort[profile]'"
        )
    return found


def _listening(address: str) -> int:
    """The process of this machine that listens at HOST:PORT; of several gateways the head, who came first."""
    import psutil

    from ringfort.errors import Unavailable

    _, _, port = address.rpartition(":")
    listening = {
        int(connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid is not None
        if connection.laddr and str(connection.laddr.port) == port
    }
    if listening:
        return min(listening, key=lambda pid: psutil.Process(pid).create_time())
    raise Unavailable(f"no process of this machine, or none of yours, listens at {address}: give --pid")
