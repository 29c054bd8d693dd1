"""Telling how far a load is: a bar for people, lines of JSON for programs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ringfort.load.load import Load
from ringfort.terminal import print_json

_TELL_EVERY_S = 1.0


def run_with_bar(load: Load, title: str, console: Console) -> None:
    """Runs a load under a bar; without one where the console is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f}/s", style="dim"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        start = load.progress
        task = bar.add_task(title, total=start.total, completed=load.start.rows, rate=0.0)
        for progress in load.run():
            bar.update(task, completed=progress.acknowledged + progress.failed, rate=progress.rate)


def run_with_json(load: Load) -> None:
    """Runs a load, printing its progress every second, whatever it waits for, and once more at the end."""
    with _every_second(load):
        for _ in load.run():
            pass


@contextmanager
def _every_second(load: Load) -> Iterator[None]:
    over = threading.Event()

    def tell() -> None:
        while not over.wait(_TELL_EVERY_S):
            print_json(asdict(load.progress))

    teller = threading.Thread(target=tell, name="load-progress", daemon=True)
    teller.start()
    done = False
    try:
        yield
        done = True
    finally:
        over.set()
        teller.join()
        print_json({**asdict(load.progress), "done": done, "problems": load.problems})
