"""Data directories to start from, and one that a demo has filled."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from command_line import run
from first_demo import FirstDemo
from up import lend_model


@pytest.fixture(scope="session")
def prepared(made_data_dir: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed data directory with an empty database and a built model; to be copied."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    copy(made_data_dir, path)
    lend_model(model_dir, path)
    return path


@pytest.fixture
def data_dir(prepared: Path, tmp_path: Path) -> Path:
    """A test's own data directory, with an empty database and a built model."""
    return copy(prepared, tmp_path / "data")


def copy(source: Path, target: Path) -> Path:
    """A closed data directory once more."""
    # cp keeps owners, who under root are not root.
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


@pytest.fixture(scope="session")
def first_demo(tmp_path_factory: pytest.TempPathFactory) -> FirstDemo:
    """`ringfort demo --json` on a directory that is not there yet: database, model and all."""
    path = tmp_path_factory.mktemp("demo")
    began_s = time.monotonic()
    result = run("demo", "--data-dir", "demo-data", "--json", cwd=path, timeout_s=170)
    return FirstDemo(path / "demo-data", result, time.monotonic() - began_s)


@pytest.fixture
def demo_data(first_demo: FirstDemo, tmp_path: Path) -> Path:
    """A copy of what the first demo left, the model not included."""
    path = copy(first_demo.data_dir, tmp_path / "data")
    shutil.rmtree(path / "models")
    return path
