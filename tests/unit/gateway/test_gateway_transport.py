"""Which gRPC server there is, what it is refused for, and that both tell a call's deadline alike."""

import sys
from pathlib import Path

import grpc
import pytest

from services.config import GatewaySettings
from services.data_dir import StartupError
from services.embedded import require_private
from services.gateway.transport import left_s, transport_of

NATIVE = GatewaySettings(server="native")


@pytest.mark.parametrize("server", ["aio", "native"])
async def test_a_call_without_a_deadline_gets_the_default(server: str) -> None:
    if server == "native":
        pytest.importorskip("pygrpc_native", reason="pygrpc-native has no wheel for this platform")

    async def left(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return str(left_s(context, 7.5)).encode()

    running = transport_of(GatewaySettings(server=server)).make()
    running.add_registered_method_handlers("Clock", {"Left": grpc.unary_unary_rpc_method_handler(left)})
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary("/Clock/Left")
            assert float(await ask(b"")) == 7.5
            assert 7.5 < float(await ask(b"", timeout=60)) <= 61  # on the wire it is rounded up
    finally:
        await running.stop(None)


def test_the_native_server_speaks_no_tls(tmp_path: Path) -> None:
    settings = GatewaySettings(server="native", tls_certificate=tmp_path, tls_key=tmp_path)
    with pytest.raises(StartupError, match="no TLS"):
        transport_of(settings)


def test_the_native_server_listens_beyond_loopback_only_where_that_was_accepted() -> None:
    with pytest.raises(StartupError, match=r"--insecure, as gateway\.server: native speaks no TLS"):
        require_private("grpc", "0.0.0.0:7700", NATIVE)
    require_private("grpc", "0.0.0.0:7700", GatewaySettings(server="native", insecure=True))


def test_a_missing_native_server_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    monkeypatch.setitem(sys.modules, "pygrpc_native.aio", None)
    with pytest.raises(StartupError, match=r"pip install 'ringfort\[native\]'"):
        transport_of(NATIVE)
    assert transport_of(GatewaySettings()).make is grpc.aio.server
