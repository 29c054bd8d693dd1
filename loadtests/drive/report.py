"""A result as a page: Markdown with tables, and plots beside it as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.drive import result
from loadtests.drive.tally import QUANTILES, Latencies

FAULT_QUANTILES = ("p50", "p90", "p99", "max")
#: Of the plot of quantiles: 0 to 99.99%, the tail spread out.
_TAIL = 1 - np.logspace(0, -4, 60)


def write(told: Mapping[str, Any], directory: Path) -> Path:
    """`report.md`, `latency.png` and `time.png` in the directory; the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    _plots(told, directory)
    page = directory / "report.md"
    page.write_text("\n".join(_lines(told)) + "\n")
    return page


def _lines(told: Mapping[str, Any]) -> list[str]:
    machine, scenario, service = told["machine"], told["scenario"], told["service"]
    lines = [
        f"# {scenario['name']}",
        "",
        scenario["about"],
        "",
        f"{told['made_at']}, Ringfort {service['version']} ({service['composition']}), "
        f"{service['documents']:,} documents, on {machine['cpus']} × {machine['cpu']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, Python {machine['python']}. "
        f"{scenario['arrival'].capitalize()} arrivals, keys {scenario['keys']['kind']}, "
        f"{scenario['processes']} client processes on the same machine. Latency is from the intended start.",
        "",
    ]
    if told["interrupted"]:
        lines += ["**Interrupted: the figures are of the part that ran.**", ""]
    if "saturation" in told:
        found = told["saturation"]
        lines += [
            f"Saturation: **{found['rate']:,.0f} calls a second** (p99 within {found['p99_limit_ms']:g} ms).",
            "",
            *_table(
                ("rate", "answered", "p99 ms", "sustained"),
                [
                    (f"{s['rate']:,.0f}", f"{s['answered_share']:.1%}", f"{s['p99_ms']:,.1f}",
                     "yes" if s["sustained"] else "no")
                    for s in found["steps"]
                ],
            ),
        ]  # fmt: skip
    for run in told["runs"]:
        lines += [f"## {run['label']}: {run['rate']:,.0f} calls a second for {run['seconds']:.0f} s", ""]
        rows = [
            (name, f"{o['answered_per_s']:,.1f}", f"{o['failed_share']:.2%}",
             *(f"{o['latency_ms'][quantile]:,.2f}" for quantile in QUANTILES))
            for name, o in {"all": run["all"], **run["operations"]}.items()
        ]  # fmt: skip
        lines += _table(("operation", "answered/s", "failed", *(f"{q} ms" for q in QUANTILES)), rows)
        doubt = result.doubt(run)
        lines += [f"**Little can be said of the service: {doubt}.**", ""] if doubt else []
        if run["faults"]:
            lines += _table(
                (
                    "fault",
                    "target",
                    "from s",
                    "to s",
                    "due then",
                    "failed",
                    *(f"{q} ms" for q in FAULT_QUANTILES),
                ),
                [
                    (
                        *(f["kind"], f["target"], f"{f['began_s']:.1f}", f"{f['ended_s']:.1f}"),
                        *(f"{f['calls']['due']:,}", f"{f['calls']['failed']:,}"),
                        *(f"{f['calls'][quantile]:,.1f}" for quantile in FAULT_QUANTILES),
                    )
                    for f in run["faults"]
                ],
            )
            lines += [f"Due then: from its beginning until {result.AFTERMATH_S:g} s after its end.", ""]
        if run["stages"]:
            lines += _table(
                ("stage", "count", "p50 ms", "p99 ms"),
                [
                    (name, f"{s['count']:,.0f}", f"{s['p50_ms']:.2f}", f"{s['p99_ms']:.2f}")
                    for name, s in run["stages"].items()
                ],
            )
    return [*lines, "![latency by share of calls](latency.png)", "", "![the run, by second](time.png)"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [*("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)), ""]


def _plots(told: Mapping[str, Any], directory: Path) -> None:
    # Here, for it takes a second; and by its own canvas, as the process may have no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="share of calls", ylabel="latency, ms")
    for run in told["runs"]:
        if not run["all"]["due"]:
            continue
        latencies = Latencies.decoded(run["all"]["histogram"])
        axes.plot(
            1 / (1 - _TAIL), [max(latencies.quantile_ms(100 * share), 1e-3) for share in _TAIL],
            label=f"{run['label']} ({run['rate']:,.0f}/s)",
        )  # fmt: skip
    axes.set_xticks([1, 10, 100, 1_000, 10_000], ["0", "90%", "99%", "99.9%", "99.99%"])
    axes.grid(alpha=0.3)
    if told["runs"]:
        axes.legend()
    FigureCanvasAgg(figure).print_figure(directory / "latency.png", dpi=120)

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.set(ylabel="latency, ms", yscale="log")
    below.set(xlabel="second of the run", ylabel="calls a second")
    for run in told["runs"]:
        label, series = run["label"], run["series"]
        seconds = [each["second"] for each in series]
        for quantile, style in (("p99", "-"), ("p50", ":")):
            values = [max(each[f"{quantile}_ms"], 1e-3) for each in series]
            above.plot(seconds, values, style, label=f"{label} {quantile}")
        below.plot(seconds, [each["answered"] for each in series], label=f"{label} ended")
        if any(each["failed"] for each in series):
            below.plot(seconds, [each["failed"] for each in series], ":", label=f"{label} failed")
        for fault in run["faults"]:
            for axes in (above, below):
                axes.axvspan(fault["began_s"], fault["ended_s"], alpha=0.15)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if told["runs"]:
            axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_figure(directory / "time.png", dpi=120)
