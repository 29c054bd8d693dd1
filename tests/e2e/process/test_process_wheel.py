"""The wheel, built and installed as users get it, runs the demo without the checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from command_line import environment, run

ROOT = Path(__file__).parents[3]
NOT_SOURCE = ("*.egg-info", "__pycache__", "build", "dist", "tests", "ringfort-data", ".*")

#: Prints where each of our packages is imported from.
WHERE = """
import index_builder, protos, ringfort, services, shard_router
for package in (index_builder, protos, ringfort, services, shard_router):
    print(package.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built in a copy, as building leaves things behind."""
    here = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, here / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", here / "dist"]
    result = run(*build, cwd=source, program=[sys.executable])
    assert result.returncode == 0, result.stderr
    (made,) = (here / "dist").iterdir()
    return made


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The bin directory of a new environment with the wheel, which borrows what the wheel needs from ours."""
    home = tmp_path / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    pip = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    result = run(*pip, cwd=tmp_path, program=[sys.executable])
    assert result.returncode == 0, result.stderr
    (site,) = home.glob("lib/python*/site-packages")
    # Of a directory named so the .pth files are not read, and with them not that of our own checkout.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_runs_the_demo(installed: Path, demo_data: Path, tmp_path: Path) -> None:
    env = environment()
    env.pop("PYTHONPATH", None)
    said = run("-c", WHERE, cwd=tmp_path, env=env, program=[installed / "python"])
    files = said.stdout.split()
    assert len(files) == 5
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in files), files

    options = ["--data-dir", demo_data, "--json"]
    result = run("demo", *options, cwd=tmp_path, env=env, program=[installed / "ringfort"], timeout_s=120)
    assert result.returncode == 0, result.stderr
    first = json.loads(result.stdout.splitlines()[0])
    assert first["request"]["text"] == "fast json parser"
    assert "jiter" in [hit["id"] for hit in first["answer"]["hits"]]


def test_the_wheel_has_the_contract_the_corpus_and_no_tests(wheel: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True
    ).stdout
    for file in (
        "ringfort/data/pypi-top.tsv", "ringfort/py.typed", "services/metadata/queries.sql",
        "protos/ringfort/v1/search.proto", "protos/ringfort/v1/search_pb2.pyi", "LICENSE", "NOTICE",
    ):  # fmt: skip
        assert file in listed
    assert "tests/" not in listed
    assert "loadtests/" not in listed
