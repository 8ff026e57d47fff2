"""Settings of the whole suite, made before PyTorch is imported, and scripts run as a user runs them."""

import io
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

# Some virtual machines advertise AMX and then refuse its instructions; oneDNN's bf16 products would crash there.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# Two test processes with a thread each; with more, threads would wait for one another's core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """Made-up hearts that no test changes: two patients train, one validates, one tests."""
    from datasets.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, (2, 1, 1))
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Leave out the curves that a run draws after every epoch: they take longer than the epochs of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.run_folder.save_progress", lambda *_: None)
        yield


@pytest.fixture
def full_precision(monkeypatch):
    """Let float32 mean float32 on a GPU too, and restore after the test what it was before, and the threads."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


@dataclass
class Outcome:
    """What a script printed and how it ended."""

    script: str
    status: int
    output: str
    error: str

    def succeeded(self) -> "Outcome":
        assert self.status == 0, self.error
        return self


def run_in_process(script: str, *arguments: object, folder: Path = ROOT) -> Outcome:
    """Run a script of the repository in this process, as ``python script.py ...`` would in ``folder``."""
    import torch

    output, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(error):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(logging.getLogger(), "handlers", [])  # without pytest's, as in a process of its own
        patch.chdir(folder)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            torch.use_deterministic_algorithms(False)
    return Outcome(script, status, output.getvalue(), error.getvalue())


@cache
def flags_of(script: str) -> set[str]:
    return set(re.findall(r"--\w+", run_in_process(script, "--help").output))


@pytest.fixture
def run_script() -> Callable[..., Outcome]:
    return run_in_process


def files(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file in a folder, by its path there."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_lists(folder: Path, **names: Iterable[str]) -> None:
    """Write a list of names for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in names.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in of_split), encoding="utf-8")


def data_flags(data: Path) -> list[str]:
    """Return the flags of ``train_acdc.py`` for a phantom; from the third on they are those of ``test_acdc.py``."""
    return ["--root_path", f"{data}/train_npz", "--volume_path", f"{data}/test_vol_h5", "--list_dir", f"{data}/lists"]


SMALL = (
    "--model_scale pico --pretrained none --img_size 32 --img_size_dmwla 32 --feature_dim 16 --decoder_feature_dim 16 "
    "--columns_per_cluster 20 --warmup_iterations 2 --batch_size 4 --max_iterations 3 --num_workers 0 --device cpu"
).split()
"""Flags of a training that takes seconds: three steps, one past the memory's warm-up."""


@pytest.fixture(scope="session")
def trained(phantom, tmp_path_factory) -> Path:
    """The run folder of ``train_acdc.py`` with SMALL on the phantom, and ``results_test`` in it; no test changes it."""
    folder = tmp_path_factory.mktemp("trained") / "acdc"
    run_in_process("train_acdc.py", *data_flags(phantom), *SMALL, "--output_dir", folder).succeeded()
    run_in_process("test_acdc.py", *data_flags(phantom)[2:], "--checkpoint", folder, "--device", "cpu").succeeded()
    return folder


@pytest.fixture
def make_volume():
    """Return a maker of volumes in which every voxel's brightness is its own, so that no turn or flip goes unseen."""
    from datasets import Volume
    from datasets.acdc import CLASS_NAMES

    def make(name: str = "patient001_frame01", shape: tuple[int, int, int] = (3, 20, 14)) -> Volume:
        rng = np.random.default_rng(sum(name.encode()))
        image = (rng.permutation(np.prod(shape)) + 1).reshape(shape).astype(np.float32)
        label = rng.integers(0, 4, shape).astype(np.uint8)
        return Volume(name, image / image.max(), label, (8.0, 1.5, 1.25), np.diag([1.25, 1.5, 8.0, 1.0]), CLASS_NAMES)

    return make


@pytest.fixture
def prepared(tmp_path: Path, make_volume) -> Path:
    """A prepared data set: patients 1 and 2 for training, 3 for validation, 4 for test, two frames each."""
    from datasets.preparation import RawCase, prepare_volumes

    out = tmp_path / "prepared"
    write_lists(out / "lists", train=["patient001", "patient002"], val=["patient003"], test=["patient004"])
    names = [f"patient{patient:03d}_frame{frame:02d}" for patient in (1, 2, 3, 4) for frame in (1, 9)]
    prepare_volumes(lambda case: make_volume(case.name), [RawCase(name, ()) for name in names], out)
    return out


@pytest.fixture
def refused() -> Callable[..., str]:
    """Call a function, expect an error of ours, of one line in which all the words stand, and return the line."""
    from datasets import DataError
    from networks import NetworkError
    from utils.errors import RunError

    def check(function: Callable, *words: object) -> str:
        with pytest.raises((DataError, NetworkError, RunError)) as caught:
            function()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message
        return message

    return check
