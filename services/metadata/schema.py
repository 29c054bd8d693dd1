"""The database's schema: migrations, forward only."""

from importlib import resources

from services.metadata.database import Connection
from services.metadata.statements import bare_statement

#: server_version_num of the oldest server whose SQL the migrations may use (STORAGE in CREATE TABLE).
OLDEST_SERVER = 160_000


class StartupRefused(RuntimeError):
    """The store cannot serve this database; one sentence for people says why."""


def migrations() -> dict[int, tuple[str, str]]:
    """Number to (name, SQL) of every migration of this release, ascending."""
    files = resources.files(__package__).joinpath("migrations").iterdir()
    found = sorted(
        (file.name, file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".sql")
    )
    return {int(name.split("_", 1)[0]): (name, text) for name, text in found}


async def migrate(connection: Connection, where: str) -> None:
    """Apply what is missing, each migration in a transaction of its own.

    The caller holds the service lock, so nobody migrates beside it. Raises StartupRefused, about the
    database called `where`, if a newer release was here.
    """
    cursor = await connection.execute(bare_statement("server_facts"))
    _, _, initialised = await cursor.fetchone() or (0, "", False)
    has = 0
    if initialised:
        cursor = await connection.execute(bare_statement("applied_migrations"))
        (has,) = await cursor.fetchone() or (0,)
    known = migrations()
    if has > max(known):
        raise StartupRefused(
            f"{where} was last used by a newer release (migration {has}, this one knows {max(known)}); "
            "start that release."
        )
    for number, (name, text) in known.items():
        if number > has:
            async with connection.transaction():
                await connection.execute(text.encode())
                await connection.execute(bare_statement("record_migration"), {"number": number, "name": name})
