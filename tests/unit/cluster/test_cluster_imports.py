"""Ray is imported where it is asked for, and nowhere else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_neither_composition_imports_ray_by_itself() -> None:
    code = (
        "import sys, services.__main__, services.embedded, services.cluster, services.processes\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'ray'))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.strip() == "[]"
