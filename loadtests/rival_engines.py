"""The other engines, in a process of their own: `.venv-bench/bin/python rival_engines.py MODEL FP32`.

Imports nothing of this project. MODEL is the sentence-transformers directory, FP32 the model as ONNX. Reads a
JSON object a line and answers each with one:

{"prepare": ENGINE}                          -> {}
{"run": ENGINE, "batches": [[ids, …], …]}    -> {"processor_s": …}         one thread
{"embed": ENGINE, "texts": [ids, …]}         -> {"vectors": [[…], …]}      each text alone
{"sentences": [text, …], "threads": n}       -> {"seconds": …}             SentenceTransformer.encode

Whatever cannot be done is answered with {"error": reason}.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Ids = Sequence[Sequence[int]]
#: From a batch of token ids to vectors that are not yet of length 1.
Run = Callable[[Ids], np.ndarray]


def main(model: Path, fp32: Path) -> None:
    """Answer the lines of stdin until it ends."""
    makers = {"ctranslate2": _ctranslate2, "openvino-bf16": _openvino, "onnxruntime-dynamic": _onnxruntime}
    runs: dict[str, Run] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                if name := asked.get("prepare"):
                    runs[name] = makers[name](model, fp32, Path(scratch))
                    answer: dict[str, object] = {}
                elif name := asked.get("run"):
                    answer = {"processor_s": _processor_s(runs[name], asked["batches"])}
                elif name := asked.get("embed"):
                    rows = [runs[name]([ids])[0] for ids in asked["texts"]]
                    answer = {"vectors": [(row / np.linalg.norm(row)).tolist() for row in rows]}
                else:
                    answer = {"seconds": _sentences(model, asked["sentences"], asked["threads"])}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:300]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _processor_s(run: Run, batches: Sequence[Ids]) -> float:
    began = time.process_time()
    for batch in batches:
        run(batch)
    return time.process_time() - began


def _padded(batch: Ids) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, batch))
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(batch):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def _mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mean: np.ndarray = np.einsum("nth,nt->nh", hidden, mask.astype(np.float32)) / mask.sum(1, keepdims=True)
    return mean


def _ctranslate2(model: Path, fp32: Path, scratch: Path) -> Run:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(str(model))
    converter.convert(str(scratch / "ctranslate2"), quantization="int8", force=True)
    encoder = ctranslate2.Encoder(
        str(scratch / "ctranslate2"), device="cpu", compute_type="int8", intra_threads=1
    )

    def run(batch: Ids) -> np.ndarray:
        hidden = np.asarray(encoder.forward_batch([list(text) for text in batch]).last_hidden_state)
        return _mean(hidden, _padded(batch)[1])

    return run


def _openvino(model: Path, fp32: Path, scratch: Path) -> Run:
    import openvino
    import torch
    from transformers import AutoModel

    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this processor has no bf16")
    example = torch.ones((2, 8), dtype=torch.int64)
    inputs = {"input_ids": example, "attention_mask": example, "token_type_ids": example * 0}
    graph = openvino.convert_model(AutoModel.from_pretrained(str(model)).eval(), example_input=inputs)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(graph, "CPU", settings)

    def run(batch: Ids) -> np.ndarray:
        ids, mask = _padded(batch)
        read = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return _mean(compiled(read)[0], mask)

    return run


def _onnxruntime(model: Path, fp32: Path, scratch: Path) -> Run:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = scratch / "dynamic.onnx"
    quantize_dynamic(
        fp32, target, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])

    def run(batch: Ids) -> np.ndarray:
        ids, mask = _padded(batch)
        vectors: np.ndarray = session.run(["vectors"], {"input_ids": ids, "attention_mask": mask})[0]
        return vectors

    return run


_sentence_model: Any = None


def _sentences(model: Path, texts: Sequence[str], threads: int) -> float:
    global _sentence_model
    if _sentence_model is None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        _sentence_model = SentenceTransformer(str(model), device="cpu")
    began = time.perf_counter()
    _sentence_model.encode(list(texts), batch_size=32)
    return time.perf_counter() - began


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
