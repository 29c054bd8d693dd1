"""`python -m loadtests.bench`: measure, print one table, write build/bench.json."""

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests import (
    cache,
    cluster,
    corpus,
    e2e,
    embed,
    ingest,
    machine,
    observe,
    quality,
    reindex,
    search,
    start,
    tail,
)
from loadtests.peers import rows as peers
from loadtests.run import Run
from loadtests.scoreboard import FAMILIES, Measured, Row, entry, of_families

#: In the order they run; the last one ends the service that the others share.
MEASURES: Mapping[str, Callable[[Run], Iterator[Measured]]] = {
    "quality": quality.measure,
    "embed": embed.measure,
    "ingest": ingest.measure,
    "search": search.measure,
    "cache": cache.measure,
    "e2e": e2e.measure,
    "tail": tail.measure,
    "observe": observe.measure,
    "peers": peers.measure,
    "start": start.measure,
    "cluster": cluster.measure,
    "reindex": reindex.measure,
}
BUILD = Path(__file__).parents[1] / "build"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a family failed. No value fails anything."""
    options = _parser().parse_args(arguments)
    families = frozenset(options.only or FAMILIES)
    console = Console(stderr=True)
    measured: dict[str, Measured] = {}
    failed: list[str] = []
    told = machine.described()
    with Run(
        corpus_file=options.corpus,
        documents=options.documents,
        models=options.models,
        directory=BUILD / "bench",
        rounds=options.rounds or (1 if options.quick else 5),
        quick=options.quick,
        judged=options.ir,
    ) as run:
        for family, measure in MEASURES.items():
            if family not in families:
                continue
            began = time.perf_counter()
            try:
                for result in measure(run):
                    measured[result.name] = result
                    console.print(f"[dim]{result.name}: {_number(result.value)}[/dim]", highlight=False)
            except Exception as error:
                failed.append(family)
                traceback.print_exc()
                for row in of_families(frozenset((family,))):
                    if not row.absent:
                        why = f"{family} failed: {type(error).__name__}: {error}"
                        measured.setdefault(row.name, Measured(row.name, None, why=why))
            console.print(f"[dim]{family}: {time.perf_counter() - began:.0f} s[/dim]", highlight=False)
    rows = of_families(families)
    entries = {row.name: entry(row, measured.get(row.name)) for row in rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": told | {"quick": options.quick}, "ratios": entries}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else 150).print(_table(rows, entries))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadtests.bench", description="Ratios against ceilings of the same run."
    )
    parser.add_argument(
        "--only", type=_families, metavar="FAMILY,…", help=f"of {', '.join(FAMILIES)}; all where absent"
    )
    parser.add_argument("--rounds", type=int, help="rounds a row is measured in (default 5)")
    parser.add_argument(
        "--quick", action="store_true", help="small and short: shows that it runs, not how fast"
    )
    parser.add_argument(
        "--corpus", type=Path, default=corpus.TOP, help="a TSV like the packaged one, or its .gz"
    )
    parser.add_argument("--documents", type=int, help="how many of the corpus to use")
    parser.add_argument(
        "--models", type=Path, default=BUILD / "bench" / "models", help="where models are built"
    )
    parser.add_argument(
        "--ir", type=Path, help="a directory of judged collections: cranfield, cisi, in the form of BEIR"
    )
    parser.add_argument("--out", type=Path, default=BUILD / "bench.json")
    return parser


def _families(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in FAMILIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FAMILIES)}")
    return names


def _table(rows: Sequence[Row], entries: Mapping[str, Mapping[str, object]]) -> Table:
    table = Table("name", "what", "measured", "mark", "goal", box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        found = entries[row.name]
        value = found["value"]
        if isinstance(value, float):
            style = (
                "red" if not row.reaches(value, row.mark) else "green" if row.reaches(value, row.goal) else ""
            )
            shown, what = _number(value), row.what
        else:
            style, shown, what = "dim", "—", f"{row.what}: {found['why']}"
        sign = "≤ " if row.lower_is_better else ""
        table.add_row(row.name, what, shown, _number(row.mark, sign), _number(row.goal, sign), style=style)
    return table


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "—"
    return sign + (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}")


if __name__ == "__main__":
    # As if by Ctrl-C, so that what was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
