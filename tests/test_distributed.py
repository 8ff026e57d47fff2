"""Two processes under torchrun, on the CPU: they train as one, and end, stop and start again as one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, SMALL, data_flags
from utils.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = [*SMALL, *"--batch_size 2 --checkpoint_iterations 2 --resume auto".split()]


def start(command: list[object]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


def output_of(command: list[object]) -> str:
    process = start(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.processors
def test_two_processes_train_as_one_with_twice_the_batch_and_have_its_memory(tmp_path):
    """In float64; the memory goes through warm-up, K-means and updates, from the tokens of both processes."""
    runs = []
    for start_with, batch_size in (([sys.executable], 4), (TORCHRUN, 2)):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        output_of([*start_with, "tests/two_ranks.py", folder, batch_size])
        runs.append(torch.load(folder / "steps.pth", weights_only=True))
        runs[-1]["checkpoint"] = load_checkpoint(folder / "run/last.pth")
    one, two = runs
    losses = [torch.tensor([step["losses"] for step in run["steps"]]) for run in runs]
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()  # of the first step
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() < 1e-7 * (gradient.norm() + whole), name
    for a, b in zip(*(run["checkpoint"]["history"] for run in runs), strict=True):
        assert b["val_dice"] == pytest.approx(a["val_dice"], abs=1e-3)  # of volumes that two ranks share
    states = [run["checkpoint"]["model"] for run in runs]
    assert one["checkpoint"]["iteration"] == two["checkpoint"]["iteration"] == 6
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.endswith("counter"))
    torch.testing.assert_close(two["pools"], one["pools"])
    assert len(one["pools"]) == 8
    for step in two["steps"]:
        first, second = step["banks"]
        assert first == second  # on both ranks
    assert len({step["banks"][0] for step in two["steps"]}) == 6  # each step writes it


def test_a_rank_that_dies_ends_the_run_in_view_and_torchrun_starts_it_again(phantom, tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--max_restarts", 1, "train_acdc.py", *data_flags(phantom), *TINY, "--output_dir", folder]
    process = start([*command, "--max_iterations", 1000])
    try:
        killed = None
        for _ in range(2):
            # The new rank 1 is started when the old rank 0, which may still have written a checkpoint, is gone.
            wait_until(lambda old=killed: process_of_rank(process.pid, 1) not in (None, old), process)
            before = saved_at(folder)
            wait_until(lambda before=before: saved_at(folder) > before, process)
            killed = process_of_rank(process.pid, 1)
            os.kill(killed, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0 and "continue after epoch" in output
    assert "Signal 9 (SIGKILL)" in output
    state = load_checkpoint(folder / "last.pth")
    assert state["iteration"] >= 4 and len(state["random"]) == 2


def test_sigterm_stops_all_ranks_at_one_step_and_the_same_command_goes_on(phantom, tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, "train_acdc.py", *data_flags(phantom), *TINY, "--output_dir", folder]
    process = start([*command, "--max_iterations", 1000])
    try:
        wait_until(lambda: saved_at(folder) > 0, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "stopped by SIGTERM after iteration" in output
    stopped = load_checkpoint(folder / "last.pth")["iteration"]
    output = output_of([*command, "--max_iterations", stopped + 2])
    assert load_checkpoint(folder / "last.pth")["iteration"] == stopped + 2
    assert output.count("done after") == 1  # rank 0 alone tells


def saved_at(folder: Path) -> int:
    path = folder / "last.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def process_of_rank(torchrun: int, rank: int) -> int | None:
    """Return the process id of a rank that torchrun started, or None if it does not run."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    return None
