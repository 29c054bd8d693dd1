"""`cache warm`: answers computed before somebody waits for them."""

import json as json_text
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfort.commands.options import Collection, Json, Server

if TYPE_CHECKING:
    from protos.ringfort import v1 as pb
    from ringfort.client import Client

#: How often progress is told.
TELL_EVERY_S = 1.0


def warm(
    collection: Collection,
    queries: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='A query log: a text a line, or JSON Lines of search requests ({"text": …, "k": …}).',
        ),
    ] = None,
    hot_keys: Annotated[
        bool, typer.Option("--hot-keys", help="What the service is asked for most; so without --queries.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Answers to compute at most.")] = 1_000,
    rate: Annotated[float, typer.Option(min=0.1, max=1_000, metavar="N", help="Answers a second.")] = 20.0,
    server: Server = None,
    json: Json = False,
) -> None:
    """Fill the cache with a collection's answers, from a query log or from what is asked for most.

    With --json a line a second says how far it is.
    """
    if queries is not None and hot_keys:
        raise typer.BadParameter("give one of the two", param_hint="--queries / --hot-keys")
    from ringfort.client import Client
    from ringfort.errors import Unavailable
    from ringfort.terminal import print_json

    told_s = time.monotonic()
    progress: dict[str, Any] = {}
    with Client(server) as client:
        steps = (
            _from_hot_keys(client, collection, limit, rate)
            if queries is None
            else _from_log(client, collection, queries, limit, rate)
        )
        for progress in steps:
            if time.monotonic() >= told_s + TELL_EVERY_S:
                told_s = time.monotonic()
                print_json(progress) if json else typer.echo(_line(progress), err=True)
    print_json(progress) if json else typer.echo(_line(progress))
    if progress["failed"] and not progress["computed"] + progress["cached"]:
        raise Unavailable("no answer could be computed")


def _line(progress: dict[str, Any]) -> str:
    computed, cached, failed = (progress[name] for name in ("computed", "cached", "failed"))
    return f"{computed:,} answers computed, {cached:,} were in the cache, {failed:,} failed"


def _from_hot_keys(client: "Client", collection: str, limit: int, rate: float) -> Iterator[dict[str, Any]]:
    """A second's worth a call, until nothing is left or it has been tried once."""
    computed = failed = 0
    while True:
        room = limit - computed - failed
        answer = client.warm_cache(collection, limit=min(room, max(1, int(rate))), rate=rate)
        computed, failed = computed + answer.computed, failed + answer.failed
        yield {"computed": computed, "cached": answer.known - answer.left - computed, "failed": failed}
        if answer.left <= answer.failed or computed + failed >= limit:
            return


def _from_log(
    client: "Client", collection: str, file: Path, limit: int, rate: float
) -> Iterator[dict[str, Any]]:
    from protos.ringfort import v1 as pb
    from ringfort.calls.call import Call, whole
    from ringfort.errors import NotFound, RingfortError

    progress = {"computed": 0, "cached": 0, "failed": 0}
    next_s = time.monotonic()
    for number, request in enumerate(_requests(file, collection)):
        if number >= limit:
            break
        time.sleep(max(0.0, next_s - time.monotonic()))
        next_s = max(next_s + 1 / rate, time.monotonic())
        try:
            answer = client.send(Call("SearchService/Search", request, pb.SearchResponse, whole))
        except NotFound:
            raise
        except RingfortError:
            progress["failed"] += 1
        else:
            progress["computed" if answer.served_from == pb.INDEX else "cached"] += 1
        yield progress
    yield progress


def _requests(file: Path, collection: str) -> Iterator["pb.SearchRequest"]:
    """The log's lines as requests; InvalidArgument names a line that is none."""
    from google.protobuf import json_format

    from protos.ringfort import v1 as pb
    from ringfort.errors import InvalidArgument

    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            request = pb.SearchRequest(text=line)
            if line.startswith("{"):
                try:
                    request = json_format.ParseDict(json_text.loads(line), pb.SearchRequest())
                except (ValueError, json_format.ParseError) as error:
                    raise InvalidArgument(f"{file}, line {number}: {error}", field="queries") from None
            request.collection = collection
            yield request
