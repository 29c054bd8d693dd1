"""What commands share at their edge: asking the service, printing JSON, printing for people."""

import json
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, RenderableType

from ringfort.calls.call import Call
from ringfort.channel import DEFAULT_TIMEOUT_S
from ringfort.client import Client

M = TypeVar("M", bound=Message)

#: Columns where the output is no terminal: enough for a table to be read in a file or a log.
_PIPED_WIDTH = 120


def ask(server: str | None, call: Call[M, Any], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> M:
    """The service's answer to one call, as its message."""
    with Client(server, timeout_s=timeout_s) as client:
        return client.send(call)


def as_json(message: Message) -> dict[str, Any]:
    """A message as JSON values: field names as in the contract, defaults included, integers as numbers."""
    fields: dict[str, Any] = MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        unquote_int64_if_possible=True,
    )
    return fields


def print_json(answer: Message | Mapping[str, Any]) -> None:
    """One line of JSON on standard output, at once."""
    fields = as_json(answer) if isinstance(answer, Message) else answer
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """Where output for people goes; plain text of a fixed width where that is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPED_WIDTH, highlight=False)


def show(*renderables: RenderableType) -> None:
    """Prints for people."""
    out = console()
    for renderable in renderables:
        out.print(renderable)
