"""What is read off ONNX Runtime's trace."""

import gzip
import json

from ringfort.operators import Operator, costliest


def node(operator: str, dur: int, kind: str = "kernel_time") -> dict[str, object]:
    return {"cat": "Node", "name": f"{operator}_1_{kind}", "dur": dur, "args": {"op_name": operator}}


def test_operators_are_summed_and_the_costliest_come_first() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 99_999, "args": {}},
        node("Gelu", 1_000), node("MatMul", 4_000), node("MatMul", 4_000), node("Add", 1_000),
        node("MatMul", 77, "fence_before"),
    ]  # fmt: skip
    trace = gzip.compress(json.dumps(events).encode())
    assert costliest(trace, 2) == [Operator("MatMul", 2, 8.0, 0.8), Operator("Add", 1, 1.0, 0.1)]
    assert costliest(gzip.compress(b"[]"), 2) == []
