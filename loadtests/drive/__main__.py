"""`python -m loadtests.drive run|ramp|report|compare`: open-loop load, what it came to, and what changed.

Without --server a service of our own is started on an empty data directory, with its servers behind proxies,
so that faults can be made. Ctrl-C ends a run early and keeps what there is of it. Exit codes: 0, 1 (failed),
2 (usage), 130 (interrupted).
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from index_builder.models.build import ensure_model
from loadtests import corpus, machine
from loadtests.drive import comparison, driver, report, result
from loadtests.drive.house import House, scratch
from loadtests.drive.result import Measured, ResultRefused
from loadtests.drive.saturation import saturation
from loadtests.drive.scenario import Fault, Scenario, ScenarioRefused, read
from loadtests.service import ServiceFailed
from ringfort.errors import RingfortError

BUILD = Path(__file__).parents[2] / "build"
FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.do(options)
    except (ScenarioRefused, ResultRefused) as error:
        return _failed(error, USAGE)
    except (RingfortError, ServiceFailed, driver.DriverFailed, OSError) as error:
        return _failed(error, FAILED)
    except KeyboardInterrupt:  # before or after the run itself, which ends by itself then
        return INTERRUPTED
    return code


def _run(options: argparse.Namespace) -> int:
    scenario = _scenario(options)
    with _stage(options, scenario) as (stage, fault), _Screen(options.json) as screen:

        async def work(stop: asyncio.Event) -> tuple[list[Measured], None]:
            progress = screen.progress(scenario.name, scenario.seconds)
            return [await driver.run(stage, scenario, fault=fault, progress=progress, stop=stop)], None

        runs, _, interrupted = _interruptible(work)
        return _finish(options, scenario, stage, "run", runs, interrupted)


def _ramp(options: argparse.Namespace) -> int:
    scenario = _scenario(options)
    with _stage(options, scenario) as (stage, _), _Screen(options.json) as screen:

        async def work(stop: asyncio.Event) -> tuple[list[Measured], dict[str, Any]]:
            steps, runs = await driver.ramp(
                stage, scenario, step_s=options.step_seconds, p99_limit_ms=options.p99_limit_ms, stop=stop,
                progress=lambda label: screen.progress(
                    label, scenario.seconds if label.endswith("%") else options.step_seconds
                ),
            )  # fmt: skip
            limit_ms = options.p99_limit_ms
            return runs, {
                "rate": saturation(steps, limit_ms),
                "p99_limit_ms": limit_ms,
                "steps": [
                    {
                        "rate": step.rate,
                        "answered_share": step.answered_share,
                        "p99_ms": step.p99_ms,
                        "sustained": step.sustained(limit_ms),
                    }
                    for step in steps
                ],
            }

        runs, found, interrupted = _interruptible(work)
        return _finish(options, scenario, stage, "ramp", runs, interrupted, found)


def _report(options: argparse.Namespace) -> int:
    told = result.read(options.result)
    page = report.write(told, options.out or options.result.with_suffix(""))
    _say(options, {"report": str(page)}, str(page))
    return 0


def _compare(options: argparse.Namespace) -> int:
    a, b = result.read(options.a), result.read(options.b)
    found, differences = comparison.compare(a, b), comparison.differences(a, b)
    if options.json:
        rows = [
            {"run": c.run, "operation": c.operation, "figure": c.figure, "a": c.a, "b": c.b, "ratio": c.ratio}
            for c in found
        ]
        print(json.dumps({"differences": differences, "compared": rows}))
        return 0
    table = Table("run", "operation", "figure", "A", "B", "B / A", box=None, header_style="bold")
    for column in table.columns[3:]:
        column.justify = "right"
    for c in found:
        ratio = "—" if c.ratio is None else f"{c.ratio:.2f}"
        table.add_row(c.run, c.operation, c.figure, f"{c.a:,.3f}", f"{c.b:,.3f}", ratio)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for difference in differences:
        console.print(f"[yellow]differs[/yellow] {difference}", highlight=False)
    console.print(table)
    return 0


def _scenario(options: argparse.Namespace) -> Scenario:
    scenario = read(options.scenario)
    given = {
        name: value
        for name in ("rate", "seconds", "processes")
        if (value := getattr(options, name)) is not None
    }
    # Decoded anew, so that what is given is held to the same bounds.
    told = msgspec.to_builtins(scenario) | given
    try:
        scenario = msgspec.convert(told, Scenario)
    except msgspec.ValidationError as error:
        raise ScenarioRefused(f"command line: {error}") from None
    if scenario.faults and options.server:
        raise ScenarioRefused("faults can only be made in a service of our own: leave out --server")
    return scenario


@contextmanager
def _stage(
    options: argparse.Namespace, scenario: Scenario
) -> Iterator[tuple[driver.Stage, Callable[[Fault], Awaitable[None]] | None]]:
    """The service to load, with its documents, and how faults are made in it."""
    with scratch(BUILD / "drive") as directory:
        here = Path(directory)

        def prepared(server: str, http: str) -> driver.Stage:
            return driver.prepare(
                server, scenario, corpus_file=options.corpus, documents=options.documents, directory=here,
                http=http,
            )  # fmt: skip

        if options.server:
            yield prepared(options.server, options.http), None
            return
        ensure_model(options.models)
        with House(options.models, here) as house:
            yield prepared(house.grpc, house.http), house.fault


def _interruptible(
    work: "Callable[[asyncio.Event], Awaitable[tuple[list[Measured], Any]]]",
) -> tuple[list[Measured], Any, bool]:
    """The work, told to stop at the first SIGINT or SIGTERM; whether it was."""

    async def watched() -> tuple[list[Measured], Any, bool]:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            runs, told = await work(stop)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return runs, told, stop.is_set()

    return asyncio.run(watched())


def _finish(
    options: argparse.Namespace,
    scenario: Scenario,
    stage: driver.Stage,
    kind: str,
    runs: Sequence[Measured],
    interrupted: bool,
    found: Mapping[str, object] | None = None,
) -> int:
    now = datetime.now(UTC)
    told = result.result(
        kind, scenario, runs, machine=machine.described(), made_at=now.isoformat(timespec="seconds"),
        service=stage.service, saturation=found, interrupted=interrupted,
    )  # fmt: skip
    out = options.out or BUILD / "drive" / f"{scenario.name}-{kind}-{now:%Y%m%dT%H%M%S}.json"
    result.write(out, told)
    page = report.write(told, out.with_suffix("")) if options.report else None
    if options.json:
        print(json.dumps({"result": str(out), **({"report": str(page)} if page else {})}))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        if found is not None:
            console.print(f"saturation: {found['rate']:,.0f} calls a second", highlight=False)
        for run in told["runs"]:
            console.print(_table(run))
            if doubt := result.doubt(run):
                console.print(f"[yellow]{run['label']}: {doubt}[/yellow]", highlight=False)
        console.print(f"[dim]{out}[/dim]", *([f"[dim]{page}[/dim]"] if page else []), highlight=False)
    return INTERRUPTED if interrupted else 0


def _table(run: Mapping[str, Any]) -> Table:
    quantiles = list(run["all"]["latency_ms"])
    table = Table(
        "operation", "answered/s", "failed", *(f"{q} ms" for q in quantiles), box=None, header_style="bold",
        title=f"{run['label']}: {run['rate']:,.0f} calls a second", title_justify="left",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, o in {**run["operations"], "all": run["all"]}.items():
        latency = (f"{o['latency_ms'][quantile]:,.2f}" for quantile in quantiles)
        table.add_row(name, f"{o['answered_per_s']:,.1f}", f"{o['failed_share']:.2%}", *latency)
    return table


class _Events(logging.Handler):
    """Hands on what is logged of servers that are killed and started again."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """As of every handler."""
        self._tell(record.getMessage())


class _Screen:
    """Progress for people on stderr; with --json a line of JSON at every turn."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
        )
        self._log = _Events(self._tell)
        self._bars = Progress(*columns, console=Console(stderr=True), disable=as_json)

    def __enter__(self) -> "_Screen":
        self._bars.start()
        logging.getLogger().addHandler(self._log)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._log)
        self._bars.stop()

    def _tell(self, event: str) -> None:
        """Say that a server ended or is back, without tearing the bars, or as JSON too."""
        if self._as_json:
            print(json.dumps({"event": event}), file=sys.stderr, flush=True)
        else:
            self._bars.console.print(event, markup=False, highlight=False)

    def progress(self, label: str, seconds: float) -> driver.Progress:
        """Where one run tells how far it is."""
        task = self._bars.add_task(label, total=seconds, told="")

        def tell(at_s: float, codes: Mapping[str, int]) -> None:
            good, bad = driver.answered(codes)
            self._bars.update(task, completed=max(0.0, at_s), told=f"{good:,} answered, {bad:,} failed")
            if self._as_json:
                told = {"run": label, "at_s": round(at_s, 1), "answered": good, "failed": bad}
                print(json.dumps(told), file=sys.stderr, flush=True)

        return tell


def _say(options: argparse.Namespace, told: Mapping[str, object], words: str) -> None:
    print(json.dumps(told) if options.json else words)


def _failed(error: Exception, code: int) -> int:
    print(f"loadtests.drive: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtests.drive", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, do, help in (
        ("run", _run, "one run of a scenario"),
        ("ramp", _ramp, "find saturation, then measure at 50, 70 and 90% of it"),
    ):
        command = commands.add_parser(name, help=help)
        command.set_defaults(do=do)
        command.add_argument("scenario", help="a shipped scenario's name, or a YAML file")
        command.add_argument("--server", metavar="HOST:PORT", help="a running service, in place of our own")
        command.add_argument(
            "--http", metavar="HOST:PORT", default="", help="its metrics, for the times of its stages"
        )
        command.add_argument("--rate", type=float, help="calls a second, in place of the scenario's")
        command.add_argument("--seconds", type=float)
        command.add_argument("--processes", type=int)
        command.add_argument("--documents", type=int, default=5_000)
        command.add_argument("--corpus", type=Path, default=corpus.TOP)
        command.add_argument("--models", type=Path, default=BUILD / "bench" / "models")
        command.add_argument("--out", type=Path, metavar="FILE", help="the result, as JSON")
        command.add_argument("--report", action="store_true", help="a page with plots beside it, too")
        command.add_argument("--json", action="store_true")
        if name == "ramp":
            command.add_argument("--step-seconds", type=float, default=8.0)
            command.add_argument("--p99-limit-ms", type=float, default=500.0)
    command = commands.add_parser("report", help="a page with plots of a result")
    command.set_defaults(do=_report)
    command.add_argument("result", type=Path)
    command.add_argument("--out", type=Path, metavar="DIR")
    command.add_argument("--json", action="store_true")
    command = commands.add_parser("compare", help="what result B is to result A")
    command.set_defaults(do=_compare)
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    # As if by Ctrl-C, so that what was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
