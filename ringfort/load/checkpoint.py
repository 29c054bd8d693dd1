"""How far a load has come, kept in a small file so that the same command goes on from there."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Position:
    """The first `rows` rows are acknowledged; `failed` of them were refused."""

    rows: int = 0
    failed: int = 0


def state_directory() -> Path:
    """Where positions are kept: under XDG_STATE_HOME, or ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "ringfort" / "loads"


def file_identity(path: Path) -> str:
    """Changes whenever the file does: size, modification time and a digest of its head."""
    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    return f"{status.st_size}:{status.st_mtime_ns}:{head}"


class Checkpoint:
    """The position of one load, known by everything that makes it that load and no other.

    `identity` names the server, the collection and when it was created, the file and the columns: after a
    change of any of them a load starts over.
    """

    def __init__(self, directory: Path, identity: Sequence[str]) -> None:
        name = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:32]
        self.path = directory / f"{name}.json"

    def read(self) -> Position:
        """The position recorded last; the start where there is none, or none that can be read."""
        try:
            fields = json.loads(self.path.read_bytes())
            return Position(int(fields["rows"]), int(fields["failed"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Position()

    def write(self, position: Position) -> None:
        """Records a position, whole or not at all. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.new")
        fresh.write_text(json.dumps(asdict(position)))
        fresh.replace(self.path)

    def remove(self) -> None:
        """Forgets the position: the load is complete."""
        self.path.unlink(missing_ok=True)
