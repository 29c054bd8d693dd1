"""A container's quota counts where it is less than the machine."""

import os
from pathlib import Path

import pytest

from services.embedder.cpus import usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cpus_are_those_of_the_affinity_within_the_quota(
    tmp_path: Path, files: dict[str, str], cpus: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path, tmp_path / "no-such-file") == cpus


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "300000 100000\n"}, 3),
        ("0::/a.slice/b.service\n", {"a.slice/cpu.max": "200000 100000\n"}, 2),
        (
            "0::/a.slice/b.service\n",
            {"a.slice/cpu.max": "500000 100000\n", "a.slice/b.service/cpu.max": "400000 100000\n"},
            4,
        ),
        ("0::/a.slice\n", {"b.slice/cpu.max": "100000 100000\n"}, 8),
        ("0::/elsewhere/than/here\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/../../a\n", {}, 8),
        (
            "3:memory:/m\n2:cpu,cpuacct:/docker/x\n1:cpuset:/s\n",
            {
                "cpu,cpuacct/docker/x/cpu.cfs_quota_us": "150000\n",
                "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ("4:memory:/m\n0::/a\n", {"unified/a/cpu.max": "100000 100000\n"}, 1),
        ("nonsense\n", {"cpu.max": "100000 0\n"}, 8),
    ],
)
def test_a_quota_counts_wherever_around_the_process_it_is_set(
    tmp_path: Path, own: str, files: dict[str, str], cpus: int
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path, tmp_path / "own") == cpus


def test_this_process_has_a_cpu_and_no_more_than_its_affinity() -> None:
    assert 1 <= usable_cpus() <= 8
