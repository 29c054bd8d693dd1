"""What the gate found, for people."""

from rich.table import Table

from index_builder.models.manifest import Measured, ModelManifest


def gate_table(manifest: ModelManifest) -> Table:
    """Every way to run the model that was tried, with its figures; the chosen one is marked."""
    gate = manifest.gate
    table = Table(title=f"{manifest.model}, space {manifest.space}", title_justify="left", box=None)
    for name in ("", "precision", "threads", "reduction", "MB", "cosine", "p1", "worst", "overlap", "kept"):
        table.add_column(name, justify="left" if name in ("", "precision", "reduction") else "right")
    for name in ("alone = batch", "b1 ms", "b32 texts/s", "a CPU-s", "memory MB"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for i, row in enumerate(gate.table if gate else ()):
        table.add_row(*_cells(row, chosen=gate is not None and i == gate.chosen))
    for length, kept in (gate.kept_at if gate else {}).items():
        table.add_row("", "fp32", "", f"first {length}", *[""] * 5, f"{kept:.3f}", *[""] * 5, "declared")
    return table


def _cells(row: Measured, *, chosen: bool) -> list[str]:
    head = ["*" if chosen else "", row.precision, str(row.threads), row.reduction or "-"]
    verdict = "; ".join(row.failed) or ("chosen" if chosen else "passes")
    if row.agreement is None:
        return [*head, f"{row.graph_bytes / 1e6:.1f}" if row.graph_bytes else "-", *["-"] * 10, verdict]
    return [
        *head,
        f"{row.graph_bytes / 1e6:.1f}",
        f"{row.agreement.mean:.5f}",
        f"{row.agreement.p1:.5f}",
        f"{row.agreement.worst:.5f}",
        f"{row.overlap:.3f}",
        f"{row.kept:.3f}",
        f"{row.batch_invariance:.7f}",
        f"{row.latency_ms:.2f}",
        f"{row.texts_per_s:.0f}",
        f"{row.texts_per_cpu_s:.0f}",
        f"{row.memory_bytes / 1e6:.0f}",
        verdict,
    ]
