"""The gRPC server under the wrapper: grpc.aio's own, or pygrpc-native's, whose transport is in Rust.

Both have one API and run the same handlers. The native one serves on its own what is registered by name, and
hands everything else to a grpc.aio server on a Unix socket behind it.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import grpc

from services.config import GatewaySettings
from services.data_dir import StartupError


class Transport(NamedTuple):
    """What makes a server from its `options`, and how that one is to be stopped."""

    make: Callable[..., grpc.aio.Server]
    #: Its stop cuts answers that are not yet on their way, so it has to be left in peace for so long before.
    linger_s: float = 0.0


_AIO = Transport(grpc.aio.server)
#: What the native server says is left of a call that brings no deadline; grpc.aio says None.
_UNLIMITED_S = float(sys.maxsize)


def transport_of(settings: GatewaySettings) -> Transport:
    """The server that `gateway.server` names; StartupError where it cannot be had so."""
    if settings.server == "aio":
        return _AIO
    if settings.tls_certificate or settings.tls_key:
        raise StartupError(
            "gateway.server: native speaks no TLS; end it before the service, or take gateway.server: aio"
        )
    try:
        import pygrpc_native.aio  # `from pygrpc_native import aio` recurses without end in 0.5.0
    except ImportError as error:
        raise StartupError(
            f"gateway.server: native needs pygrpc-native ({error}); run: pip install 'ringfort[native]'"
        ) from None
    return Transport(pygrpc_native.aio.server, linger_s=0.25)


def left_s(context: grpc.aio.ServicerContext[object, object], default_s: float) -> float:
    """Seconds until the deadline that a call brings, or the default of one that brings none."""
    left_s = context.time_remaining()
    return default_s if left_s is None or left_s >= _UNLIMITED_S else left_s
