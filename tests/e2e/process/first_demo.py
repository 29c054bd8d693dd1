"""What the first demo of a session left for the tests."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FirstDemo:
    """How the first demo on an empty directory went."""

    data_dir: Path
    result: "subprocess.CompletedProcess[str]"
    took_s: float
