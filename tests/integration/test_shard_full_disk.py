"""A disk that is really full: a filesystem of a few megabytes in a mount namespace of the test's own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOUNT = 'mount -t tmpfs -o size=4m none "$1"'


def unshare(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script as root of a user namespace, where mounts are nobody else's."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_costs_no_answers_and_is_recovered_from(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or unshare(MOUNT, str(tmp_path)).returncode:
        pytest.skip("this machine lets nobody mount a filesystem of their own")
    replica = str(Path(__file__).with_name("full_disk.py"))
    ran = unshare(f'{MOUNT}; exec "$2" "$3" "$1"', str(tmp_path), sys.executable, replica)
    assert ran.returncode == 0, ran.stderr
    full, freed = (line.split() for line in ran.stdout.splitlines())
    assert full[0] == "disk_full"
    assert int(full[1]) >= 500
    assert full[2] == "True"
    assert int(full[3]) >= 500
    assert freed == ["serving", full[1], "True", "0"]
    assert "No space left on device" in ran.stderr
