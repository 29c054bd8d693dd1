"""Settings: where they come from, and that no mistake passes in silence."""

from pathlib import Path

import pytest

from services.config import ConfigError, GatewaySettings, load
from services.data_dir import StartupError
from services.embedded import require_private


def test_the_command_line_beats_the_environment_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ringfort.yaml"
    file.write_text("gateway: {max_in_flight: 1, drain_s: 1, grpc: '127.0.0.1:1'}\n")
    monkeypatch.setenv("RINGFORT_GATEWAY__DRAIN_S", "2")
    monkeypatch.setenv("RINGFORT_GATEWAY__GRPC", "127.0.0.1:2")
    monkeypatch.setenv("RINGFORT_SERVER", "127.0.0.1:7700")  # the client's, not a setting
    gateway = load(file, gateway={"grpc": "127.0.0.1:3"}).gateway
    assert (gateway.max_in_flight, gateway.drain_s, gateway.grpc) == (1, 2.0, "127.0.0.1:3")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gatway: {}", "gatway"),
        ("gateway: {port: 1}", "gateway.port"),
        ("shard: {poll_ms: 0}", "shard.poll_ms"),
        ("gateway: {operator_keys: {k: t}}", "without api_keys"),
        ("gateway: {api_keys: {k: t}, operator_keys: {k: t}}", "among both"),
        ("gateway: [", "configuration file"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "ringfort.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load(file)


def test_a_mistake_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFORT_GATWAY__GRPC", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="RINGFORT_GATWAY__GRPC"):
        load(None)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:7700", "[::1]:7700", "127.9.9.9:1"])
def test_loopback_is_private(address: str) -> None:
    require_private("grpc", address, GatewaySettings())


@pytest.mark.parametrize("address", ["0.0.0.0:7700", "[::]:7700", "10.0.0.1:1", "example.org:1"])
def test_listening_beyond_loopback_wants_guards(address: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--insecure"):
        require_private("grpc", address, GatewaySettings())
    with pytest.raises(StartupError, match="--insecure"):
        require_private("grpc", address, GatewaySettings(api_keys={"k": "t"}))
    require_private("grpc", address, GatewaySettings(insecure=True))
    guarded = GatewaySettings(api_keys={"k": "t"}, tls_certificate=tmp_path, tls_key=tmp_path)
    require_private("grpc", address, guarded)


@pytest.mark.parametrize("address", ["7700", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":1"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(StartupError, match="HOST:PORT"):
        require_private("grpc", address, GatewaySettings())
