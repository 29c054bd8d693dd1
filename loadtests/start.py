"""Starting on what is on disk, and the memory that a document takes then."""

from collections.abc import Iterator

from loadtests.run import Run, shape_of
from loadtests.scoreboard import Measured
from loadtests.service import Service
from loadtests.timing import median
from ringfort import Client

_K = 10
#: The large corpus, less the queries that are kept out of it.
_LARGE = 299_000


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family; the shared service ends here."""
    library = run.library
    full, empty = run.stop(), run.new_data_dir("empty")
    run.start(empty).stop()
    ready_s: list[float] = []
    bytes_each: list[float] = []
    residents: list[dict[str, int]] = []
    shape: dict[str, int] = {}
    for _ in range(run.rounds):
        with run.start(empty) as service:
            _ask(run, service, None)
            bare = service.resident()
        with run.start(full) as service:
            ready_s.append(service.ready_s)
            found = _ask(run, service, library.collection)
            resident = service.resident()
            with Client(service.grpc) as client:
                shape = {"documents": found, **shape_of(client, library.collection)}
        if found != len(library.packages):
            raise RuntimeError(f"{found} documents after a restart, of {len(library.packages)}")
        residents.append({name: resident[name] - bare[name] for name in resident})
        bytes_each.append(residents[-1]["Pss"] / len(library.packages))
    started = shape | {"seconds_by_round": ready_s}
    yield Measured("start.ready_s", median(ready_s), started)
    if len(library.packages) >= _LARGE:
        yield Measured("start.ready_s.300k", median(ready_s), started)
    else:
        why = f"this corpus has {len(library.packages)} documents; give one of {_LARGE} with --corpus"
        yield Measured("start.ready_s.300k", None, why=why)
    memory = {
        "unit": "Pss of the service's process, less that of one without documents, after the same questions",
        "anonymous": median(each["Pss_Anon"] for each in residents) / len(library.packages),
        "mapped_files": median(each["Pss_File"] for each in residents) / len(library.packages),
    }
    yield Measured("memory.bytes_per_document", median(bytes_each), memory | shape)


def _ask(run: Run, service: Service, collection: str | None) -> int:
    """Embed every query, and search with its vector where there is a collection; its documents."""
    with Client(service.grpc, timeout_s=120) as client:
        for text, vector in zip(run.library.queries, run.library.query_vectors, strict=True):
            client.embed([text])
            if collection is not None:
                client.search(collection, vector=vector, k=_K, cache=False)
        return 0 if collection is None else client.count(collection)
