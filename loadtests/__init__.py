"""Measures the service against ceilings of the same run: `python -m loadtests.bench`."""

import os

# Before anything loads the libraries that read them. Sides bring a thread a core of their own; and gRPC
# need not prepare for forks, which only start other programs here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
