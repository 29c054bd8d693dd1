"""Every command and every program of the README works as it stands there."""

import os
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
from command_line import RINGFORT, environment, run
from up import Up

ROOT = Path(__file__).parents[3]
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The README's blocks of this language and no further word (`sh no-test` is not for here)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block for info, block in FENCED.findall(text) if info.strip() == language]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory that looks like the checkout's root; what commands make in it stays there."""
    corpus = Path("ringfort", "data", "pypi-top.tsv")
    (tmp_path / corpus).parent.mkdir(parents=True)
    for entry in (*ROOT.glob("[!.]*"), *(ROOT / "ringfort").iterdir()):
        copy = tmp_path / entry.relative_to(ROOT)
        if not copy.exists() and entry.name not in ("ringfort-data", "build"):
            copy.symlink_to(entry)
    # Of the corpus a part will do: the whole of it is loaded by the demo.
    with (ROOT / corpus).open(encoding="utf-8") as lines:
        (tmp_path / corpus).write_text("".join(islice(lines, 2_000)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def session(service: Up, checkout: Path) -> dict[str, str]:
    """The environment of a terminal beside a running service."""
    path = f"{RINGFORT.parent}{os.pathsep}{os.environ['PATH']}"
    return environment(PATH=path, RINGFORT_SERVER=service.grpc, XDG_STATE_HOME=str(checkout / "state"))


def test_every_command_works_in_one_session(checkout: Path, session: dict[str, str]) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if not line.startswith("make")]
    assert any(line.startswith("ringfort ") for line in lines)
    (checkout / "session.sh").write_text("\n".join(lines))
    # Whoever is asked whether they are sure, is.
    script = "set -euxo pipefail; . ./session.sh < <(yes || :)"
    result = run(script, cwd=checkout, env=session, program=["bash", "-c"], timeout_s=150)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_program_works(checkout: Path, session: dict[str, str]) -> None:
    for program in blocks("python"):
        program = program.replace("127.0.0.1:7700", session["RINGFORT_SERVER"])
        result = run("-c", program, cwd=checkout, env=session, program=[sys.executable], timeout_s=60)
        assert result.returncode == 0, result.stderr
        assert result.stdout
