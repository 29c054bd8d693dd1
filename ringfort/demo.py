"""`ringfort demo`: a service of its own, a real corpus, and what can be done with it, told as it happens."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from protos.ringfort import v1 as pb
from ringfort import tables, terminal
from ringfort.calls import search as search_calls
from ringfort.calls.call import Call, M
from ringfort.client import Client
from ringfort.commands.service import up_command
from ringfort.errors import DeadlineExceeded, FailedPrecondition, NotFound
from ringfort.load.columns import Columns
from ringfort.load.load import Load
from ringfort.load.progress import run_with_bar
from ringfort.load.sources import TsvSource

COLLECTION = "packages"
ATTRIBUTES = {"name": "keyword", "version": "keyword", "last_release": "keyword", "downloads_rank": "int"}
QUERIES = (
    "fast json parser",
    "async web framework",
    "plot charts in the terminal",
    "scrape and parse html",
    "train neural networks on a gpu",
)
HITS = 8

#: The first start makes a database and builds the embedding model.
READY_WITHIN_S = 180.0
#: Everything together; on two cores it takes well under a minute.
DONE_WITHIN_S = 900.0
STOPPED_WITHIN_S = 30.0


class Service:
    """`ringfort up` as a child of this process, on free ports; `stop` it, whatever happens.

    `grpc` and `http` are its addresses, once `wait_until_ready` has returned.
    """

    def __init__(self, data_dir: Path) -> None:
        self.grpc = self.http = ""
        self._log = data_dir.with_name(f"{data_dir.name}.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        listen = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
        command = up_command("--data-dir", str(data_dir), *listen, "--json")
        with self._log.open("w") as log:
            # In a session of its own: Ctrl-C is for the demo, which then stops the service in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Returns once it answers. Raises FailedPrecondition, with its own last words, if it never will."""
        assert self._process.stdout is not None
        overdue = threading.Timer(READY_WITHIN_S, self._process.kill)
        overdue.start()
        try:
            line = self._process.stdout.readline()
        finally:
            overdue.cancel()
        try:
            ready = json.loads(line)
        except ValueError:
            words = self._log.read_text(errors="replace").split("\n")
            last = next((word for word in reversed(words) if word.strip()), "it ended without a word")
            why = last.removeprefix("ringfort: ")
            raise FailedPrecondition(f"the service did not start: {why} (its log: {self._log})") from None
        self.grpc, self.http = ready["grpc"], ready["http"]

    def stop(self) -> None:
        """Ends it in order, and by force if that takes too long."""
        self._process.terminate()
        try:
            self._process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Demo:
    """The show, from an empty directory (or the last run's) to a stopped service.

    With `json` the answers are printed as lines of JSON in place of tables; with `keep` the service stays.
    """

    def __init__(self, data_dir: Path, *, keep: bool, json: bool) -> None:
        self._data_dir, self._keep, self._json = data_dir, keep, json
        self._console = Console(file=sys.stdout, quiet=True) if json else terminal.console()
        self._deadline_s = time.monotonic() + DONE_WITHIN_S

    def run(self) -> None:
        """Runs the show; the service is stopped whatever happens, unless it is kept after a full run."""
        with _terminated_is_interrupted():
            self._say("Starting a service", f"data in {self._data_dir}; the first start takes longest")
            service = Service(self._data_dir)
            stays = False
            try:
                self._wait_for(service)
                with Client(service.grpc) as client:
                    self._fill(client)
                    self._show(client)
                stays = self._keep
            except KeyboardInterrupt:
                self._say("Interrupted", "stopping the service")
                raise
            finally:
                if not stays:
                    service.stop()
        self._close(service)

    def _say(self, headline: str, detail: str = "") -> None:
        if time.monotonic() > self._deadline_s:
            raise DeadlineExceeded(f"the demo was not done within {DONE_WITHIN_S:.0f} s")
        line = Text("\n▸ ", style="cyan").append(headline, style="bold default")
        if detail:
            line.append(f"  {detail}", style="dim default")
        self._console.print(line)

    def _wait_for(self, service: Service) -> None:
        began_s = time.monotonic()
        with self._console.status("Postgres, cache, embedding model, index …"):
            service.wait_until_ready()
        took = f"ready in {time.monotonic() - began_s:.1f} s"
        self._console.print(f"  {took} · gRPC {service.grpc} · HTTP {service.http}", style="dim")

    def _fill(self, client: Client) -> None:
        with as_file(files("ringfort") / "data" / "pypi-top.tsv") as path:
            source = TsvSource(path)
            self._say(f"Loading {source.count():,} packages", "name and summary of PyPI's most downloaded")
            try:
                client.collection(COLLECTION)
            except NotFound:
                client.create_collection(COLLECTION, attributes=ATTRIBUTES)
            if client.count(COLLECTION) == source.count():
                self._console.print("  already there, from an earlier run", style="dim")
                return
            load = Load(
                client, COLLECTION, source, Columns("name", "summary", ATTRIBUTES), wait="VISIBLE", batch=512
            )
            run_with_bar(load, "  embedding and indexing", self._console)
            done = load.progress
            self._console.print(
                f"  {done.acknowledged:,} embedded, committed and searchable · {done.rate:,.0f} a second",
                style="dim",
            )

    def _show(self, client: Client) -> None:
        self._say("Searching by meaning")
        for query in QUERIES:
            self._search(client, query)
        self._say("The same question again", "the answer comes from memory, as long as nothing was written")
        self._search(client, QUERIES[0])
        filter = "downloads_rank < 500"
        self._say("Searching among the 500 most downloaded", f"filter: {filter}")
        self._search(client, "http client", filter=filter)
        self._say(
            "Recommending", "more like requests and httpx, less like boto3; popular ones first, not too alike"
        )
        call = search_calls.recommend(
            COLLECTION,
            like=["requests", "httpx"],
            unlike=["boto3"],
            k=HITS,
            rank={"similarity": 1.0, "downloads_rank": -0.2},
            mmr_lambda=0.8,
        )
        answer = self._ask(client, "recommend", call)
        self._hits(answer, "requests + httpx − boto3")
        self._console.print(Text("  ").append(tables.stages(answer)))
        self._exactness(client)

    def _exactness(self, client: Client) -> None:
        """What it costs that a cached answer is never behind a write, and what a bound on its age saves."""
        self._say("What exact caching costs", "one search around a write, with and without allowing age")
        document = client.get(COLLECTION, ["requests"])[0]
        assert document is not None

        def ask(what: str, **options: Any) -> None:
            call = search_calls.search(COLLECTION, text="http for humans", k=HITS, **options)
            answer = self._ask(client, "exactness", call)
            line = Text(f"  {what:<44}").append(tables.provenance(answer))
            self._console.print(line)

        ask("a search")
        ask("the same search")
        client.upsert(COLLECTION, [document])
        ask("after a write, exact (the default)")
        ask("again")
        client.upsert(COLLECTION, [document])
        ask("after a write, up to 60 s old is fine", max_staleness_ms=60_000)

    def _search(self, client: Client, query: str, *, filter: str | None = None) -> None:
        call = search_calls.search(COLLECTION, text=query, k=HITS, filter=filter)
        self._hits(self._ask(client, "search", call), query)

    def _ask(self, client: Client, step: str, call: Call[M, Any]) -> M:
        answer = client.send(call)
        if self._json:
            asked = {"request": terminal.as_json(call.request), "answer": terminal.as_json(answer)}
            terminal.print_json({"step": step, **asked})
        return answer

    def _hits(self, answer: pb.SearchResponse | pb.RecommendResponse, title: str) -> None:
        indented = (0, 0, 0, 2)
        table = tables.hits(answer.hits, width=self._console.width - 2, attributes=["downloads_rank"])
        self._console.print(Text(f"\n  “{title}”", style="bold"))
        self._console.print(Padding(table, indented), Text("  ").append(tables.provenance(answer)), sep="\n")

    def _close(self, service: Service) -> None:
        if self._keep:
            self._say("The service is still running", f"stop it with: kill {service.pid}")
            self._console.print(
                f"  export RINGFORT_SERVER={service.grpc}\n"
                f'  ringfort search {COLLECTION} "your own question"\n'
                f"  ringfort cluster describe"
            )
            if self._json:
                kept = {"grpc": service.grpc, "http": service.http, "pid": service.pid}
                terminal.print_json({"step": "kept", **kept})
        else:
            self._say("Done, and everything is stopped again", "a second run starts from what is there")
            self._console.print(
                "  ringfort demo --keep   leaves the service running, to search it yourself\n"
                "  ringfort up            runs one for your own documents"
            )


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it stops what it started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
