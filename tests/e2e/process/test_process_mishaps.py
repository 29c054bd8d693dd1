"""What keeps `ringfort` from doing its work is told in one sentence, with the exit code that fits."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import FREE_PORTS, RINGFORT, environment, run

from index_builder.models.source import INSTALL_COMMAND, PACKAGE
from services.data_dir import DataDir


def refused(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """The command failed with one sentence on stderr that has these words."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("ringfort: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("port", ["--grpc", "--http"])
def test_a_taken_port_is_named_before_anything_is_made(port: str, taken: str, tmp_path: Path) -> None:
    ports = dict(zip(FREE_PORTS[::2], FREE_PORTS[1::2], strict=True)) | {port: taken}
    result = run("up", *(part for pair in ports.items() for part in pair), cwd=tmp_path)
    refused(result, f"cannot listen on {taken}: address already in use")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_names_its_owner(tmp_path: Path) -> None:
    owner = DataDir.open(tmp_path / "data", release="test")
    result = run("up", "--data-dir", "data", *FREE_PORTS, cwd=tmp_path)
    owner.close()
    refused(result, f"in use by process {os.getpid()};")


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"format": 2, "postgres_major": 19, "created_by": "7.0"}, "written by a newer release (7.0)"),
        ({"format": 1, "postgres_major": 17, "created_by": "0.0.9"}, "holds a Postgres 17 cluster"),
    ],
)
def test_a_directory_of_another_release_is_left_alone(
    stored: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.mkdir()
    (path / "format.json").write_text(json.dumps(stored))
    refused(run("up", "--data-dir", "data", *FREE_PORTS, cwd=tmp_path), str(path), words)
    assert {entry.name for entry in path.iterdir()} == {"format.json", "lock"}


def test_a_file_and_somebody_elses_directory_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("words")
    refused(run("up", "--data-dir", "mine", *FREE_PORTS, cwd=tmp_path), "not Ringfort's", "'thesis.tex'")
    refused(run("up", "--data-dir", "mine/thesis.tex", *FREE_PORTS, cwd=tmp_path), "is a file")
    refused(run("up", "--data-dir", "mine/thesis.tex/data", *FREE_PORTS, cwd=tmp_path), "not a directory")
    assert [entry.name for entry in mine.iterdir()] == ["thesis.tex"]


#: A root of one's own, and in it a disk of 64 MiB that goes with the process.
SMALL_DISK = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]


def _can_mount_a_small_disk() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = subprocess.run([*SMALL_DISK, "mount -t tmpfs none /mnt"], capture_output=True, check=False)
    return probe.returncode == 0


@pytest.mark.skipif(not _can_mount_a_small_disk(), reason="needs the right to make a mount namespace")
def test_a_nearly_full_disk_is_told_before_it_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=64m none disk; exec "$@"'
    program = [*SMALL_DISK, script, "sh", RINGFORT]
    result = run("up", "--data-dir", "disk/data", *FREE_PORTS, cwd=tmp_path, program=program)
    refused(result, "disk full:", "MiB left", "256 MiB are needed")


WITHOUT_THE_MODEL = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name == {PACKAGE!r} else find(name, *args)
"""


def test_a_missing_model_package_comes_with_the_command_that_installs_it(
    data_dir: Path, tmp_path: Path
) -> None:
    shutil.rmtree(data_dir / "models")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_THE_MODEL)
    env = environment(PYTHONPATH=str(tmp_path))
    result = run("up", "--data-dir", data_dir, *FREE_PORTS, cwd=tmp_path, env=env)
    refused(result, f"; run: {INSTALL_COMMAND}\n")


def test_unknown_settings_are_named(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"

    def up(text: str, **env: str) -> "subprocess.CompletedProcess[str]":
        settings.write_text(text)
        return run("up", *FREE_PORTS, "--config", settings, cwd=tmp_path, env=environment(**env))

    refused(up("gateway: {prot: 7700}"), "setting gateway.prot: there is no such setting")
    refused(up("", RINGFORT_CACHE__TTL="1"), "setting cache.ttl: there is no such setting")
    refused(up("", RINGFORT_CASH__TTL="1"), "RINGFORT_CASH__TTL")
    refused(up("gateway: ["), f"configuration file {settings}: ", "line 1")
    settings.unlink()
    refused(run("up", "--config", settings, cwd=tmp_path), f"no configuration file at {settings}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["--grpc", "--http"])
def test_nobody_listens_beyond_loopback_by_accident(port: str, tmp_path: Path) -> None:
    result = run("up", port, "0.0.0.0:0", cwd=tmp_path)
    refused(result, f"{port} 0.0.0.0:0", "TLS and API keys", "--insecure")
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_ones_own_postgres_that_is_none_is_told(data_dir: Path, tmp_path: Path) -> None:
    env = environment(RINGFORT_METADATA__POSTGRES_URL="localhost")
    result = run("up", "--data-dir", data_dir, *FREE_PORTS, cwd=tmp_path, env=env)
    refused(result, "metadata.postgres_url: ", "localhost")


def test_a_folder_named_services_is_not_mistaken_for_the_service(tmp_path: Path, taken: str) -> None:
    mine = tmp_path / "services"
    mine.mkdir()
    (mine / "__init__.py").write_text("")
    (mine / "__main__.py").write_text("raise SystemExit('the wrong services')")
    refused(run("up", "--grpc", taken, cwd=tmp_path), "address already in use")


SEARCH = ("search", "packages", "json")


@pytest.fixture
def nobody() -> str:
    """An address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("command", [SEARCH, ("get", "packages", "a")])
def test_no_service_is_one_sentence(command: tuple[str, ...], nobody: str, tmp_path: Path) -> None:
    result = run(*command, cwd=tmp_path, env=environment(RINGFORT_SERVER=nobody), timeout_s=20)
    refused(result, f"no service answers at {nobody}", "`ringfort up` starts a service")


def test_no_service_is_one_object_of_json(nobody: str, tmp_path: Path) -> None:
    result = run(*SEARCH, "--server", nobody, "--json", cwd=tmp_path, timeout_s=20)
    assert result.returncode == 1
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "UNAVAILABLE"
    assert nobody in error["message"]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("up", "--colour"), "--colour"),
        (("up", "--shards", "0"), "--shards"),
        (("up", "--shards", "many"), "--shards"),
        (("fly",), "'fly'"),
        (("search", "packages"), "text"),
        (("load", "packages"), "file"),
        (("demo", "now"), "now"),
    ],
)
def test_wrong_usage_exits_2(command: tuple[str, ...], word: str, tmp_path: Path) -> None:
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert word in result.stderr
    assert "--help" in result.stderr
    assert list(tmp_path.iterdir()) == []
