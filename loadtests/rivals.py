"""Other engines on the same weights, in `.venv-bench`, where `make bench RIVALS=1` has installed them."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from index_builder.models.source import packaged_model

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
ENGINES = ("ctranslate2", "openvino-bf16", "onnxruntime-dynamic")
ABSENT = "needs .venv-bench: make bench RIVALS=1"

Batches = Sequence[Sequence[np.ndarray]]


class RivalFailed(RuntimeError):
    """An engine could not do what was asked; one sentence."""


class Rivals:
    """The process of the other engines; a context manager that ends it."""

    def __init__(self, fp32: Path) -> None:
        script = Path(__file__).with_name("rival_engines.py")
        self._process = subprocess.Popen(
            [PYTHON, script, packaged_model(), fp32],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is ours; we end it
        )

    @staticmethod
    def installed() -> bool:
        """Whether there is an environment to run them in."""
        return PYTHON.exists()

    def prepare(self, engine: str) -> None:
        """Convert and load the model; RivalFailed where the engine or the processor cannot."""
        self._ask({"prepare": engine})

    def processor_s(self, engine: str, batches: Batches) -> float:
        """Processor seconds for batches of token ids, one thread."""
        found = self._ask({"run": engine, "batches": [[ids.tolist() for ids in each] for each in batches]})
        return float(str(found["processor_s"]))

    def vectors(self, engine: str, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors of token ids, each text alone in its batch, float32 [texts, dim]."""
        found = self._ask({"embed": engine, "texts": [ids.tolist() for ids in texts]})
        return np.array(found["vectors"], np.float32)

    def sentence_transformers_s(self, texts: Sequence[str], threads: int) -> float:
        """Seconds that SentenceTransformer.encode takes, FP32, batches of 32."""
        return float(str(self._ask({"sentences": list(texts), "threads": threads})["seconds"]))

    def _ask(self, question: Mapping[str, object]) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RivalFailed(f"the engines' process ended with {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise RivalFailed(str(answer["error"]))
        return answer

    def __enter__(self) -> "Rivals":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
