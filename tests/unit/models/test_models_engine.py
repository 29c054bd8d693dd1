"""Where a graph runs follows from what is asked for, what is there, and what the precision is made for."""

import pytest

from index_builder.models.engine import CPU, CUDA, EngineUnavailable, providers


@pytest.mark.parametrize(
    ("device", "precision", "available", "wanted"),
    [
        ("cpu", "fp16", [CUDA, CPU], [CPU]),
        ("auto", "fp32", [CPU], [CPU]),
        ("auto", "fp32", [CUDA, CPU], [CUDA, CPU]),
        ("auto", "fp16", [CUDA, CPU], [CUDA, CPU]),
        ("auto", "int8", [CUDA, CPU], [CPU]),
        ("auto", "weight8", [CUDA, CPU], [CPU]),
        ("cuda", "int8", [CUDA, CPU], [CUDA, CPU]),
    ],
)
def test_a_device_is_chosen(device: str, precision: str, available: list[str], wanted: list[str]) -> None:
    assert providers(device, precision, available) == wanted


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(EngineUnavailable, match="no CUDA provider"):
        providers("cuda", "fp32", [CPU])
    with pytest.raises(ValueError, match="device is 'tpu'"):
        providers("tpu", "fp32", [CPU])
