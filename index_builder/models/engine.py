"""The engine: what loads a graph and runs it, with the options that serving and the gate share."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
#: Its name in variants and in the gate's table.
ENGINE = "onnx"
#: Precisions that a GPU computes as they are; the others are made for CPUs.
GPU_PRECISIONS = ("fp32", "fp16")


class EngineUnavailable(RuntimeError):
    """The device is not here, or the runtime cannot load the graph; the message says which."""


class Timed:
    """A second session of a graph, which times its operators while an engine runs on it. See Engine.timed."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._changed = threading.Condition()
        self._under_way = 0
        #: Runs begun.
        self.runs = 0

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> Any:
        """What the session answers."""
        with self._changed:
            self.runs += 1
            self._under_way += 1
        try:
            return self._session.run(outputs, inputs)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def trace(self) -> Path:
        """The runtime's trace, JSON, once what is under way has ended; blocks, and can be asked for once."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)
        return Path(self._session.end_profiling())


class Engine:
    """One loaded graph; `run` may be called from many threads at once."""

    def __init__(
        self,
        open_session: Callable[[Path | None], onnxruntime.InferenceSession],
        wide: onnxruntime.InferenceSession | None = None,
    ) -> None:
        """open_session: makes a session, and where a path is given one that times its operators into it.
        wide: another of the same graph, with more threads.
        """
        self._open_session = open_session
        self._session = open_session(None)
        self._wide = wide or self._session
        #: What runs all batches while it is there.
        self._timed: Timed | None = None

    @classmethod
    def load(
        cls,
        graph: bytes | Path,
        *,
        threads: int,
        threads_alone: int = 0,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> "Engine":
        """Load a graph. `threads` run one batch together; `device` is cpu, cuda or auto.

        With more `threads_alone`, so many run a batch that is said to be alone, on a CPU; the graph's weights
        are held twice then. `auto` takes a GPU where there is one and `precision` is one that it computes.
        EngineUnavailable.
        """
        chosen = providers(device, precision, onnxruntime.get_available_providers())

        def open_session(trace: Path | None, *, wide: bool = False) -> onnxruntime.InferenceSession:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads_alone if wide else threads
            options.inter_op_num_threads = 1
            # Shapes differ from batch to batch: a plan of memory for each of them would only pile up.
            options.enable_mem_pattern = False
            # Every error is raised; the runtime need not print it as well.
            options.log_severity_level = 4
            # Who is alone has the CPUs to itself, as long as it runs: waking threads for each operator would
            # take longer than what they bring.
            options.add_session_config_entry("session.intra_op.allow_spinning", str(int(wide)))
            options.add_session_config_entry("session.force_spinning_stop", "1")
            if trace is not None:
                options.enable_profiling = True
                options.profile_file_prefix = str(trace)
            try:
                return onnxruntime.InferenceSession(
                    graph if isinstance(graph, bytes) else str(graph), options, providers=chosen
                )
            except Exception as error:  # the runtime raises plain Exceptions of its own making
                raise EngineUnavailable(f"{type(error).__name__}: {error}") from error

        widens = threads_alone > threads and chosen[0] == CPU
        return cls(open_session, open_session(None, wide=True) if widens else None)

    def run(self, inputs: Mapping[str, np.ndarray], *, alone: bool = False) -> np.ndarray:
        """The graph's `vectors`, float32 [n, dim], of its inputs by name; the same however many threads run.

        alone: no other batch is running, so that this one may have all threads.
        """
        runs_on = self._timed or (self._wide if alone else self._session)
        (vectors,) = runs_on.run(["vectors"], dict(inputs))
        return np.asarray(vectors)

    def timed(self, prefix: Path) -> Timed:
        """Loads the graph once more, to be timed; its trace will lie at a path that begins so.

        EngineUnavailable.
        """
        return Timed(self._open_session(prefix))

    def run_on(self, timed: Timed | None) -> None:
        """From now on batches are run by this one, or by the engine's own sessions; what runs goes on."""
        self._timed = timed

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
