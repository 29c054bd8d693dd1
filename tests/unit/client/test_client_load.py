"""Loading files: what rows become, how far a load is, and where it goes on."""

import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from client_fakes import FakeService, Store, written

from ringfort import Client, FailedPrecondition, InvalidArgument, NotFound
from ringfort.load.checkpoint import Checkpoint, Position, file_identity, state_directory
from ringfort.load.columns import Columns, first_dim, to_attribute
from ringfort.load.load import Load, Progress
from ringfort.load.sources import open_source

UPSERT = "DocumentService/UpsertStream"


def _file(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _rows(path: Path) -> list[Any]:
    return [(row.number, dict(row.cells), row.problem) for row in open_source(path).rows()]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.tsv", '\ufeffname\tsummary\r\nray\ta "quoted" thing\r\nfaiss\t\n\nx\ty\tz')
    source = open_source(path)
    assert source.columns == ("name", "summary")
    assert source.count() == 4
    assert _rows(path) == [
        (1, {"name": "ray", "summary": 'a "quoted" thing'}, ""),
        (2, {"name": "faiss", "summary": ""}, ""),
        (3, {"name": ""}, "1 cells where the header has 2"),
        (4, {"name": "x", "summary": "y"}, "3 cells where the header has 2"),
    ]


def test_csv_has_quoting(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", 'name,summary\nray,"one, two\nthree ""four"""\n\nx\n')
    assert open_source(path).count() is None
    assert _rows(path) == [
        (1, {"name": "ray", "summary": 'one, two\nthree "four"'}, ""),
        (2, {"name": "x"}, "1 cells where the header has 2"),
    ]


def test_json_lines_keep_their_types(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.jsonl", '{"n": 1, "l": ["a"]}\n\n[1]\nnonsense\n')
    assert open_source(path).count() == 3
    first, second, third = _rows(path)
    assert first == (1, {"n": 1, "l": ["a"]}, "")
    assert second == (2, {}, "not a JSON object")
    assert third[2].startswith("not JSON: ")


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, None], "v": [[0.5, 1.0], None]}), path)
    assert open_source(path).count() == 2
    assert _rows(path) == [(1, {"n": 1, "v": [0.5, 1.0]}, ""), (2, {"n": None, "v": None}, "")]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FailedPrecondition, match=r"ringfort\[parquet\]"):
        open_source(_file(tmp_path, "a.parquet", ""))


def test_a_file_of_no_known_format(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", "id\n1\n")
    with pytest.raises(InvalidArgument, match="--format"):
        open_source(path)
    assert open_source(path, "tsv").columns == ("id",)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.tsv", b"id\nok\n\xff\n")
    with pytest.raises(InvalidArgument, match="line 3 is not UTF-8"):
        _rows(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_an_empty_file_has_no_columns(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name the columns"):
        open_source(_file(tmp_path, name, ""))


@pytest.mark.parametrize(
    ("cell", "type_", "value"),
    [
        ("", "keyword", None),
        (None, "int", None),
        (math.nan, "float", None),
        ("x", "keyword", "x"),
        (5, "keyword", "5"),
        ("42", "int", 42),
        (42.0, "int", 42),
        ("1e3", "float", 1000.0),
        (2, "float", 2.0),
        ("Yes", "bool", True),
        (False, "bool", False),
        ("0", "bool", False),
        ("2026-11-01", "timestamp", datetime(2026, 11, 1)),
        ("2026-11-01T12:00:00Z", "timestamp", datetime(2026, 11, 1, 12, tzinfo=UTC)),
        ("a, b,,c", "keywords", ["a", "b", "c"]),
        (["a", 1, None], "keywords", ["a", "1"]),
    ],
)
def test_cells_become_values(cell: Any, type_: str, value: Any) -> None:
    assert to_attribute(cell, type_, "n") == value


@pytest.mark.parametrize(
    ("cell", "type_"),
    [
        ("x", "int"),
        (1.5, "int"),
        (True, "int"),
        (2**63, "int"),
        ("x", "float"),
        (True, "float"),
        ("maybe", "bool"),
        (2, "bool"),
        ("yesterday", "timestamp"),
        (5, "timestamp"),
        (5, "keywords"),
        ({"a": 1}, "keywords"),
    ],
)
def test_cells_of_another_type_are_named(cell: Any, type_: str) -> None:
    with pytest.raises(ValueError, match=f"^n: .* is no {type_}$"):
        to_attribute(cell, type_, "n")


def test_a_row_becomes_a_document() -> None:
    columns = Columns("id", "text", {"rank": "int", "gone": "keyword"}, "vec")
    document = columns.document({"id": 7, "text": "", "rank": "3", "vec": "[1, 2.5]"})
    assert (document.id, document.text, document.attributes) == ("7", None, {"rank": 3})
    assert document.vector is not None
    assert document.vector.tolist() == [1, 2.5]
    with pytest.raises(ValueError, match="no id, which is the id"):
        columns.document({"id": ""})
    with pytest.raises(ValueError, match="vec: not a list of numbers"):
        columns.document({"id": 1, "vec": "x"})


def test_the_first_vector_tells_the_dimension(tmp_path: Path) -> None:
    rows = open_source(_file(tmp_path, "a.jsonl", '{"v": null}\n{"v": [1, 2, 3]}\n')).rows
    assert first_dim(rows(), Columns("id", None, {}, "v")) == 3
    assert first_dim(rows(), Columns("id", "v", {})) is None


def test_a_checkpoint_is_read_back_and_forgotten(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep", ["a", "b"])
    assert checkpoint.read() == Position(0, 0)
    checkpoint.write(Position(512, 3))
    assert Checkpoint(tmp_path / "deep", ["a", "b"]).read() == Position(512, 3)
    assert Checkpoint(tmp_path / "deep", ["ab", ""]).read() == Position(0, 0)
    checkpoint.path.write_text("{")
    assert checkpoint.read() == Position(0, 0)
    checkpoint.remove()
    checkpoint.remove()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_file_is_known_by_its_content_and_time(tmp_path: Path) -> None:
    path = _file(tmp_path, "a", "one")
    before = file_identity(path)
    assert file_identity(path) == before
    path.write_text("two")
    assert file_identity(path) != before


def test_positions_are_kept_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_directory() == tmp_path / "ringfort" / "loads"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_directory() == Path.home() / ".local" / "state" / "ringfort" / "loads"


COLUMNS = Columns("id", "text", {"rank": "int"})


def _tsv(directory: Path, rows: int, bad: tuple[int, ...] = ()) -> Path:
    lines = [f"{n}\ttext {n}\t{'x' if n in bad else n}" for n in range(1, rows + 1)]
    return _file(directory, "rows.tsv", "\n".join(["id\ttext\trank", *lines]))


def test_a_load_tells_how_far_it_is(fake: FakeService, tmp_path: Path) -> None:
    store = Store()
    fake.answers[UPSERT] = store
    clock = iter(range(1000))
    with Client(fake.address) as client:
        source = open_source(_tsv(tmp_path, 10, bad=(4, 10)))
        load = Load(client, "c", source, COLUMNS, batch=3, clock=lambda: float(next(clock)))
        progress = list(load.run())
    assert list(store.documents) == ["1", "2", "3", "5", "6", "7", "8", "9"]
    assert [(each.acknowledged, each.failed) for each in progress] == [(3, 0), (6, 1), (8, 1), (8, 2)]
    assert {each.total for each in progress} == {10}
    assert progress[-1].rate > 0
    assert load.problems == ["row 4: rank: 'x' is no int", "row 10: rank: 'x' is no int"]


def test_documents_the_service_refuses_are_counted(fake: FakeService, tmp_path: Path) -> None:
    def refuse(requests: Any, context: Any) -> Any:
        for request in requests:
            answer = written(request)
            answer.statuses[0].code, answer.statuses[0].message = 3, "too long"
            yield answer

    fake.answers[UPSERT] = refuse
    with Client(fake.address) as client:
        load = Load(client, "c", open_source(_tsv(tmp_path, 4)), COLUMNS, batch=2)
        *_, last = load.run()
    assert (last.acknowledged, last.failed) == (2, 2)
    assert load.problems == ["document '1': too long", "document '3': too long"]


def test_an_interrupted_load_goes_on_where_it_stopped(fake: FakeService, tmp_path: Path) -> None:
    def stop_at_third(number: int, request: Any, context: grpc.ServicerContext) -> None:
        if number == 3:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "enough")

    checkpoint = Checkpoint(tmp_path / "state", ["this load"])
    source = open_source(_tsv(tmp_path, 10, bad=(2,)))
    with Client(fake.address) as client:
        fake.answers[UPSERT] = Store(stop_at_third)
        with pytest.raises(FailedPrecondition):
            list(Load(client, "c", source, COLUMNS, batch=2, checkpoint=checkpoint).run())
        assert checkpoint.read() == Position(5, 1)

        rest = Store()
        fake.answers[UPSERT] = rest
        load = Load(client, "c", source, COLUMNS, batch=2, checkpoint=checkpoint)
        *_, last = load.run()
    assert list(rest.documents) == ["6", "7", "8", "9", "10"]
    assert (last.acknowledged, last.failed) == (9, 1)
    assert checkpoint.read() == Position()
    assert not checkpoint.path.exists()


def test_a_file_without_the_column_is_refused_before_anything_is_sent(
    fake: FakeService, tmp_path: Path
) -> None:
    with Client(fake.address) as client, pytest.raises(InvalidArgument, match="has no column 'stars'"):
        Load(client, "c", open_source(_tsv(tmp_path, 1)), Columns("id", None, {"stars": "int"}))


def test_progress_can_be_asked_before_the_start(fake: FakeService, tmp_path: Path) -> None:
    with Client(fake.address) as client:
        load = Load(client, "c", open_source(_tsv(tmp_path, 3)), COLUMNS)
        assert load.progress == Progress(0, 0, 0.0, 3)


def test_an_error_of_the_service_ends_the_load(fake: FakeService, tmp_path: Path) -> None:
    fake.answers[UPSERT] = Store(
        lambda number, request, context: context.abort(grpc.StatusCode.NOT_FOUND, "no collection")
    )
    with Client(fake.address) as client, pytest.raises(NotFound):
        list(Load(client, "c", open_source(_tsv(tmp_path, 3)), COLUMNS).run())
