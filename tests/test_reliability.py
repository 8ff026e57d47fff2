"""Runs that are killed, disks and memory that are full, bad numbers: nothing is lost, and one line says why."""

import errno
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch

from datasets.files import remove_temporaries
from tests.conftest import ROOT, SMALL, data_flags
from tests.mini import around, assert_same, trainer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import RunError
from utils.figures import save_progress
from utils.training import Trainer
from utils.watch import known_errors


def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(phantom, tmp_path, run_script):
    """SIGKILL at a random moment, with data-loader workers and a checkpoint at every third iteration."""
    flags = [*data_flags(phantom), *SMALL, "--max_iterations", "8", "--output_dir"]
    run_script("train_acdc.py", *flags, tmp_path / "whole").succeeded()
    flags += [str(tmp_path / "killed"), "--num_workers", "2", "--checkpoint_iterations", "3", "--resume", "auto"]
    process = subprocess.Popen([sys.executable, "train_acdc.py", *flags], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "killed/last.pth").exists():
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGKILL, 0), errors.decode()
    run_script("train_acdc.py", *flags).succeeded()
    for name in ("last.pth", "best.pth"):
        assert_same(load_checkpoint(tmp_path / "killed" / name), load_checkpoint(tmp_path / "whole" / name))
    tables = [pd.read_csv(tmp_path / name / "metrics.csv") for name in ("killed", "whole")]
    pd.testing.assert_frame_equal(*(table.filter(regex="(?<!seconds)$") for table in tables), check_exact=True)


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_loads(tmp_path):
    path = tmp_path / "last.pth"
    state = {"model": {"weight": torch.zeros(2**21)}, "network": {}, "data": {"class_names": ["disc"]}}
    save_checkpoint(path, state | {"number": 0})
    cut, newest = 0, 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            for number in range(newest + 1, newest + 1000):
                save_checkpoint(path, state | {"number": number})
        time.sleep(random.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += any(tmp_path.glob(".tmp*"))
        number = load_checkpoint(path)["number"]
        assert number >= newest
        newest = number
        remove_temporaries(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
    assert cut  # some were killed in the middle


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(trained, phantom, tmp_path, run_script):
    """A limit on the size of files stops the checkpoint half-way, of a new run and of a resumed one."""
    folder = Path(shutil.copytree(trained, tmp_path / "resumed"))
    before = load_checkpoint(folder / "last.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        resumed = run_script("train_acdc.py", "--resume", folder / "last.pth", "--max_iterations", 4)
        new = run_script("train_acdc.py", *data_flags(phantom), *SMALL, "--output_dir", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for done in (resumed, new):
        assert done.status == 1 and done.error.count("error:") == 1 and "make room" in done.error, done.error
    assert_same(load_checkpoint(folder / "last.pth"), before)
    assert not list(tmp_path.rglob(".tmp*")) and not list((tmp_path / "new").glob("*.pth"))


@pytest.mark.parametrize(
    "writes", ["utils.run_folder.save_checkpoint", "tensorboardX.event_file_writer.EventsWriter.flush"]
)
def test_checkpoints_and_events_on_a_full_disk_end_the_run_and_do_not_wait(tmp_path, monkeypatch, writes):
    made = trainer(tmp_path, "--max_epochs", "9", "--checkpoint_iterations", "1")
    monkeypatch.setattr(writes, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        made.fit()
    assert made.iteration <= 2


def test_full_memory_is_one_line_that_says_what_to_change(tmp_path, refused):
    def fail(error):
        with known_errors("lower --batch_size"):
            raise error

    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        refused(lambda text=text: fail(RuntimeError(text)), "the GPU's memory is full: lower --batch_size")
    refused(lambda: fail(torch.OutOfMemoryError("Tried to allocate 2.00 GiB. GPU 0 has")), "GPU", "2.00 GiB")
    text = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set"
    refused(lambda: fail(RuntimeError(text)), "adaptive_avg_pool2d_backward_cuda", "--deterministic 0")
    with pytest.raises(RuntimeError, match="another error"):
        fail(RuntimeError("another error"))
    made = trainer(tmp_path)
    made.train_step = lambda batch: torch.empty(2**56, dtype=torch.uint8)
    refused(made.fit, "the memory is full", f"{2**56} bytes", "--batch_size 2 ", "raise --accumulate", "image sizes")


def poison(made: Trainer, what: str, chosen: Callable[[int], bool]) -> None:
    """Let the loss or the gradient of the chosen iterations, counted from 1, not be finite."""
    losses = made.losses

    def poisoned(image, label):
        loss, *others = losses(image, label)
        if chosen(made.iteration + 1) and what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        elif chosen(made.iteration + 1):
            loss = loss * float("nan")
        return loss, *others

    made.losses = poisoned


@pytest.mark.parametrize(("what", "every"), [("loss", 1), ("gradient", 1), ("loss", 50)])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, what, every):
    """Of 50 steps that are looked at together, too, a checkpoint never holds a bad one."""
    made = trainer(tmp_path, "--checkpoint_iterations", "2")
    made.watch.every = every
    poison(made, what, lambda iteration: iteration == 3)
    words = f"iteration 3: the {what} is .* learning rate 1.00e-04, with the batch of [0-4], [0-4]: lower --base_lr"
    with pytest.raises(RunError, match=words):
        made.fit()
    state = load_checkpoint(tmp_path / "last.pth")
    assert state["iteration"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())


def test_fp16_skips_and_counts_overflows_and_stops_after_thirty(tmp_path, refused):
    made = trainer(tmp_path, "--amp", "fp16", "--eval_interval", "20", "--max_epochs", "20", slices=20)
    poison(made, "gradient", lambda iteration: iteration == 3 or iteration >= 7)
    refused(made.fit, "overflowed 30 times in a row", "--amp none")
    counts = [row["overflows"] for row in made.history]
    assert counts[0] >= 5  # of ten iterations: the third, and from the seventh on
    assert load_checkpoint(tmp_path / "last.pth")["overflows"] == counts[-1] == counts[0] + 10 * (len(counts) - 1)
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_memory_of_a_long_run_does_not_grow(tmp_path, monkeypatch):
    """100 iterations, with validations, curves and checkpoints."""
    monkeypatch.setattr("utils.run_folder.save_progress", save_progress)
    made = trainer(tmp_path, "--max_epochs", "10", "--keep", "2", "--eval_interval", "2", slices=20)
    resident = []

    def measure():
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    around(made, "close_epoch", after=measure)
    made.fit()
    assert made.iteration == 100 and (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert resident[-1] - resident[4] < 10 * 2**20, resident
