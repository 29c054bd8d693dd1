"""Where segments are searched."""

import logging
import re

log = logging.getLogger(__name__)

CPU = "cpu"
_CUDA = re.compile(r"cuda:\d+")


def resolve(wanted: str) -> str:
    """The device that `auto`, `cpu` or `cuda:N` comes to: always the CPU in this release.

    A CUDA device asked for by name is refused with a warning, not an error, so that one configuration
    serves machines with and without. ValueError for any other word.
    """
    if _CUDA.fullmatch(wanted):
        log.warning("segments are searched on the cpu: this release has no index for %s", wanted)
    elif wanted not in ("auto", CPU):
        raise ValueError(f"device {wanted!r} is none of auto, cpu and cuda:N")
    return CPU
