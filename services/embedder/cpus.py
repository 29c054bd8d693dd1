"""How many CPUs this process really has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: The files of a quota, as versions 2 and 1 name them, and under which of a version's mounts they lie.
QUOTAS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
MOUNTS = (("", "unified"), ("cpu", "cpu,cpuacct"))


def usable_cpus(cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """CPUs this process may run on, at least 1: its affinity, or a quota where that is less.

    A quota may be set on the process's control group or on any group around it, as containers, systemd
    units and slices do; the least one holds.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(directory, files) for directory, files in _directories(cgroups, own_groups))
    return max(1, math.ceil(min([allowed, *quotas])))


def _directories(cgroups: Path, own_groups: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Directories that may hold a quota, from the mounts' roots to the process's own group, and its files."""
    groups = {PurePosixPath("/")}
    try:
        for line in own_groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                groups.update({PurePosixPath(path), *PurePosixPath(path).parents})
    except (OSError, ValueError):
        pass  # not Linux, or no /proc: what is mounted at the root still counts
    for mounts, files in zip(MOUNTS, QUOTAS, strict=True):
        for mount in mounts:
            for group in groups:
                # Seen from inside a container a group's path may not exist; its root is then the mount's.
                yield cgroups / mount / str(group).lstrip("/"), files


def _quota(directory: Path, files: tuple[str, ...]) -> float:
    """CPUs that a group's quota amounts to, or infinity where it has none."""
    try:
        quota, period = " ".join((directory / name).read_text() for name in files).split()
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
