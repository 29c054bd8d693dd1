"""The engine: what loads a graph and runs it, with the options that serving and the gate share."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
#: Its name in variants and in the gate's table.
ENGINE = "onnx"
#: Precisions that a GPU computes as they are; the others are made for CPUs.
GPU_PRECISIONS = ("fp32", "fp16")


class EngineUnavailable(RuntimeError):
    """The device is not here, or the runtime cannot load the graph; the message says which."""


class Engine:
    """One loaded graph; `run` may be called from many threads at once."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    @classmethod
    def load(
        cls, graph: bytes | Path, *, threads: int, device: str = "cpu", precision: str = "fp32"
    ) -> "Engine":
        """Load a graph. `threads` run one batch together; `device` is cpu, cuda or auto.

        `auto` takes a GPU where there is one and `precision` is one that it computes. EngineUnavailable.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Shapes differ from batch to batch: a plan of memory for each of them would only pile up.
        options.enable_mem_pattern = False
        # Every error is raised; the runtime need not print it as well.
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        chosen = providers(device, precision, onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph), options, providers=chosen
            )
        except Exception as error:  # the runtime raises plain Exceptions of its own making
            raise EngineUnavailable(f"{type(error).__name__}: {error}") from error
        return cls(session)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The graph's `vectors`, float32 [n, dim], of its inputs by name."""
        (vectors,) = self._session.run(["vectors"], dict(inputs))
        return np.asarray(vectors)

    def inputs(self) -> dict[str, tuple[str, list[int | str | None]]]:
        """The graph's inputs by name: element type as the runtime spells it, and shape."""
        return {each.name: (each.type, list(each.shape)) for each in self._session.get_inputs()}

    def outputs(self) -> dict[str, list[int | str | None]]:
        """The graph's outputs by name, with their shapes."""
        return {each.name: list(each.shape) for each in self._session.get_outputs()}


def providers(device: str, precision: str, available: list[str]) -> list[str]:
    """Where to run, most wanted first, of what is available; EngineUnavailable, ValueError."""
    has_cuda = CUDA in available
    if device == "cpu" or (device == "auto" and not (has_cuda and precision in GPU_PRECISIONS)):
        return [CPU]
    if device not in ("cuda", "auto"):
        raise ValueError(f"device is {device!r}, not cpu, cuda or auto")
    if not has_cuda:
        raise EngineUnavailable("this ONNX Runtime has no CUDA provider")
    return [CUDA, CPU]
