"""Settings of the whole suite, made before PyTorch is imported."""

import os

import pytest

# Some virtual machines advertise AMX and then refuse its instructions; oneDNN's bf16 products would crash there.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
