"""What figures were taken on: the machine, the system, and the versions that matter."""

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil

_LIBRARIES = ("onnxruntime", "faiss-cpu", "grpcio", "numpy", "protobuf")


def described() -> dict[str, object]:
    """The machine as JSON values, and how busy it was before."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
