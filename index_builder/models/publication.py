"""How a model's directory comes to be: built aside, synced, then renamed to its place."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: How directories begin that are not finished.
BUILDING = ".building-"


def publish(building: Path, target: Path) -> None:
    """Make a finished directory the target's; a crash leaves the old one, the new one or none."""
    for path in (*building.iterdir(), building):
        _sync(path)
    if target.exists():
        # Named like an unfinished build, so that the next builder clears it away if this one dies here.
        target.rename(building.with_name(f"{building.name}-replaced"))
    building.rename(target)
    _sync(target.parent)
    _clear_unfinished(target.parent)


@contextlib.contextmanager
def sole_builder(parent: Path) -> Iterator[None]:
    """Hold the one lock of a model's directory; what a killed builder left behind is cleared away."""
    with (parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear_unfinished(parent)
        yield


def _clear_unfinished(parent: Path) -> None:
    for leftover in parent.glob(f"{BUILDING}*"):
        shutil.rmtree(leftover)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
