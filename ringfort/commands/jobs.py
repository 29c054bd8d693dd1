"""`jobs …`: long operations."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ringfort.commands.options import Json, Server

if TYPE_CHECKING:
    from protos.ringfort import v1 as pb
    from ringfort.calls.call import Call

Id = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")]

#: How often it is asked how far a job is.
_POLL_S = 0.2


def show(
    collection: Annotated[str, typer.Argument(metavar="[COLLECTION]", help="Of this collection only.")] = "",
    server: Server = None,
    json: Json = False,
) -> None:
    """List long operations, the latest first."""
    from ringfort import tables, terminal
    from ringfort.calls import operations

    answer = terminal.ask(server, operations.jobs(collection))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.jobs(answer.jobs))


def watch(job: Id, server: Server = None, json: Json = False) -> None:
    """Tell how far a long operation is, until it has ended; fails if it did."""
    from ringfort.calls import operations

    follow(server, operations.job(job), detach=False, json=json)


def cancel(job: Id, server: Server = None, json: Json = False) -> None:
    """Undo a long operation that is under way."""
    from ringfort import tables, terminal
    from ringfort.calls import operations

    answer = terminal.ask(server, operations.cancel_job(job))
    if json:
        terminal.print_json(answer)
    else:
        terminal.show(tables.jobs([answer]))


def follow(server: str | None, call: "Call[pb.Job, pb.Job]", *, detach: bool, json: bool) -> None:
    """Ask for a job, and tell of it until it has ended; with `json`, a line for every change."""
    from protos.ringfort import v1 as pb
    from ringfort import tables, terminal
    from ringfort.calls import operations
    from ringfort.client import Client

    ended = (pb.Job.SUCCEEDED, pb.Job.FAILED, pb.Job.CANCELLED)
    with Client(server) as client:
        job, told = client.send(call), None
        err = terminal.console(stderr=True)
        while True:
            if (job.state, job.done, job.message) != told:
                told = (job.state, job.done, job.message)
                if json:
                    terminal.print_json(job)
                elif job.state not in ended:
                    err.print(
                        f"{job.kind} {job.collection}: {job.done}/{job.total} {job.message}", style="dim"
                    )
            if detach or job.state in ended:
                break
            time.sleep(_POLL_S)
            job = client.send(operations.job(job.id))
    if not json:
        terminal.show(tables.jobs([job]))
    if job.state in (pb.Job.FAILED, pb.Job.CANCELLED):
        raise typer.Exit(1)
