"""The documents that everything is measured on: descriptions of Python packages."""

import gzip
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ringfort
from ringfort.documents import Vector

TOP = Path(ringfort.__file__).parent / "data" / "pypi-top.tsv"
#: What `bucket` is drawn from: a filter `bucket < 10` passes 1% of the documents.
BUCKETS = 1_000
#: Attributes of a collection of these documents.
ATTRIBUTES = {
    "name": "keyword",
    "version": "keyword",
    "last_release": "keyword",
    "downloads_rank": "int",
    "bucket": "int",
}
_SEED = 20_261_122
#: Words of a new text: about ten tokens.
_NEW_WORDS = 6


class Package(NamedTuple):
    """One document."""

    name: str
    version: str
    last_release: str
    downloads_rank: int | None
    summary: str
    bucket: int

    @property
    def attributes(self) -> dict[str, str | int]:
        """All but the text; a package below the ranking has no rank."""
        fields = self._asdict()
        return {name: fields[name] for name in ATTRIBUTES if fields[name] is not None}

    def document(self, vector: Vector | None = None) -> dict[str, object]:
        """What an upsert takes."""
        return {"id": self.name, "text": self.summary, "vector": vector, "attributes": self.attributes}


def read(path: Path, rows: int | None = None) -> Sequence[Package]:
    """The packages of a TSV (or .tsv.gz) file that have a description, in a random but fixed order.

    The order makes any first n of them a fair sample; `rows` cuts them there.
    """
    rng = random.Random(_SEED)
    packages: list[Package] = []
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        next(file)
        for line in file:
            name, version, last_release, rank, summary = line.rstrip("\n").split("\t")
            if summary:
                place = int(rank) if rank else None
                packages.append(Package(name, version, last_release, place, summary, rng.randrange(BUCKETS)))
    rng.shuffle(packages)
    return packages[:rows]


def new_texts(packages: Sequence[Package]) -> Iterator[str]:
    """Texts that no cache knows, of words of the descriptions; without end, and others at every call."""
    words = sorted({word for package in packages for word in package.summary.split() if word.isalpha()})
    rng = random.Random()
    while True:
        yield " ".join(rng.choices(words, k=_NEW_WORDS))
