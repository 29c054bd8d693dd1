"""A built model in ONNX Runtime."""

import numpy as np
import onnxruntime

from index_builder.models.manifest import ModelManifest
from index_builder.models.tokenizer import Tokenizer
from shard_router.errors import EmbedderUnavailable

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxModel:
    """One loaded model; every method may be called from many threads at once."""

    def __init__(
        self, manifest: ModelManifest, session: onnxruntime.InferenceSession, tokenizer: Tokenizer
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._session = session

    @classmethod
    def load(cls, manifest: ModelManifest, *, threads: int, device: str = "cpu") -> "OnnxModel":
        """Load a built model. `threads` run one batch together; `device` is cpu, cuda or auto.

        EmbedderUnavailable where the device is not here or the runtime cannot load the model.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Shapes differ from batch to batch: a plan of memory for each of them would only pile up.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(
                str(manifest.directory / "model.onnx"), options, providers=_providers(device, manifest)
            )
            tokenizer = Tokenizer(manifest.directory / "tokenizer.json", max_tokens=manifest.max_tokens)
        except EmbedderUnavailable:
            raise
        except Exception as error:  # both libraries raise plain Exceptions of their own making
            raise EmbedderUnavailable(manifest.model, f"{type(error).__name__}: {error}") from error
        return cls(manifest, session, tokenizer)

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [n, dim] of right-padded token ids and their mask, int64 [n, t] each."""
        (vectors,) = self._session.run(["vectors"], {"input_ids": ids, "attention_mask": mask})
        return np.asarray(vectors)


def _providers(device: str, manifest: ModelManifest) -> list[str]:
    """Where to run, most wanted first. INT8 is made for CPUs, so `auto` takes a GPU for fp32 only."""
    has_cuda = CUDA in onnxruntime.get_available_providers()
    if device == "cpu" or (device == "auto" and not (has_cuda and manifest.precision == "fp32")):
        return [CPU]
    if device not in ("cuda", "auto"):
        raise ValueError(f"device is {device!r}, not cpu, cuda or auto")
    if not has_cuda:
        raise EmbedderUnavailable(manifest.model, "this ONNX Runtime has no CUDA provider")
    return [CUDA, CPU]
