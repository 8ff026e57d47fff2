"""Settings of the whole suite, made before PyTorch is imported, and scripts run as a user runs them."""

import logging
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# Some virtual machines advertise AMX and then refuse its instructions; oneDNN's bf16 products would crash there.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# Two test processes with a thread each; with more, threads would wait for one another's core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Made-up hearts that no test changes: two patients train, one validates, one tests."""
    from datasets.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, (2, 1, 1))
    return folder


@dataclass
class Outcome:
    """What a script printed and how it ended."""

    status: int
    output: str
    error: str


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script of the repository in this process, as ``python script.py ...`` would."""
    import torch

    def run(script: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without pytest's, as in a process of its own
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            torch.use_deterministic_algorithms(False)
        return Outcome(status, *capsys.readouterr())

    return run
