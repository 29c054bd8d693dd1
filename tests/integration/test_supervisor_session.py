"""The session-end check of the tests themselves: what a test leaves running fails the session."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

CHILD = "subprocess.Popen(['sleep', '60'])"
GRANDCHILD = "subprocess.run(['sh', '-c', 'sleep 60 & echo $!'], stdout=out)"


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        (f"print({CHILD}.pid, file=out)", True),
        (GRANDCHILD, True),
        (f"process = {CHILD}; print(process.pid, file=out); process.kill(); process.wait()", False),
    ],
    ids=["child", "daemon", "ended"],
)
def test_a_session_that_leaves_a_process_fails_and_ends_it(tmp_path: Path, body: str, fails: bool) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "test_leak.py").write_text(
        textwrap.dedent(f"""
            import subprocess, warnings
            def test_leak():
                with open({str(pid_file)!r}, "w") as out:
                    {body}
                warnings.simplefilter("ignore", ResourceWarning)
        """)
    )
    session = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (session.returncode == 1) == fails, session.stdout
    assert ("processes left behind" in session.stdout) == fails
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
