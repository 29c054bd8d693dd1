"""A built model in ONNX Runtime."""

import numpy as np

from index_builder.models.engine import Engine, EngineUnavailable
from index_builder.models.manifest import GRAPH_FILE, TOKENIZER_FILE, ModelManifest
from index_builder.models.tokenizer import Tokenizer
from shard_router.errors import EmbedderUnavailable


class OnnxModel:
    """One loaded model; every method may be called from many threads at once."""

    def __init__(self, manifest: ModelManifest, engine: Engine, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine

    @classmethod
    def load(
        cls, manifest: ModelManifest, *, threads: int, threads_alone: int = 0, device: str = "cpu"
    ) -> "OnnxModel":
        """Load a built model. `threads` run one batch together, and one that is alone more of them where
        `threads_alone` is more; `device` is cpu, cuda or auto.

        EmbedderUnavailable where the device is not here or the runtime cannot load the model.
        """
        try:
            engine = Engine.load(
                manifest.directory / GRAPH_FILE,
                threads=threads,
                threads_alone=threads_alone,
                device=device,
                precision=manifest.precision,
            )
        except EngineUnavailable as error:
            raise EmbedderUnavailable(manifest.model, str(error)) from error
        try:
            tokenizer = Tokenizer(manifest.directory / TOKENIZER_FILE, max_tokens=manifest.max_tokens)
        except Exception as error:  # the library raises plain Exceptions of its own making
            raise EmbedderUnavailable(manifest.model, f"{type(error).__name__}: {error}") from error
        return cls(manifest, engine, tokenizer)

    def encode(self, ids: np.ndarray, mask: np.ndarray, *, alone: bool = False) -> np.ndarray:
        """Unit vectors float32 [n, dim] of right-padded token ids and their mask, int64 [n, t] each.

        alone: see `Engine.run`.
        """
        return self.engine.run({"input_ids": ids, "attention_mask": mask}, alone=alone)
