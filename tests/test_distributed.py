"""Two processes under torchrun, on the CPU: they train as one, and end, stop and start again as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, data_flags
from utils.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = (
    "--model_scale pico --pretrained none --img_size 64 --img_size_dmwla 64 --feature_dim 16 --decoder_feature_dim 16 "
    "--columns_per_cluster 20 --warmup_iterations 2 --batch_size 2 --num_workers 0 --device cpu --resume auto"
).split()


def run(command: list[object]) -> subprocess.CompletedProcess:
    command = list(map(str, command))
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def start(command: list[object]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[dict, dict]:
    """Return what one process with batches of 4 and two processes with batches of 2 recorded, in float64."""
    recorded = []
    for start_with, batch_size in (([sys.executable], 4), (TORCHRUN, 2)):
        folder = tmp_path_factory.mktemp("ranks")
        done = run([*start_with, "tests/two_ranks.py", folder, batch_size])
        assert done.returncode == 0, done.stderr
        recorded.append(torch.load(folder / "steps.pth", weights_only=True))
        recorded[-1]["checkpoint"] = load_checkpoint(folder / "run/last.pth")
    return tuple(recorded)


@pytest.mark.processors
def test_two_processes_train_as_one_with_twice_the_batch(one_and_two):
    one, two = one_and_two
    losses = [torch.tensor([step["losses"] for step in run["steps"]]) for run in one_and_two]
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()  # of the first step
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() < 1e-7 * (gradient.norm() + whole), name
    histories = [run["checkpoint"]["history"] for run in one_and_two]
    for a, b in zip(*histories, strict=True):
        assert b["val_dice"] == pytest.approx(a["val_dice"], abs=1e-3)  # of volumes that two ranks share
    states = [run["checkpoint"]["model"] for run in one_and_two]
    assert one["checkpoint"]["iteration"] == two["checkpoint"]["iteration"] == 6
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.endswith("counter"))


@pytest.mark.processors
def test_the_memory_of_two_processes_is_that_of_one(one_and_two):
    """Through warm-up, K-means and updates, from the tokens of both; and it is the same on both at every step."""
    one, two = one_and_two
    torch.testing.assert_close(two["pools"], one["pools"])
    assert len(one["pools"]) == 8
    for step in two["steps"]:
        first, second = step["banks"]
        assert first == second
    assert len({step["banks"][0] for step in two["steps"]}) == 6  # each step writes it


@pytest.fixture
def data(phantom) -> list[str]:
    return data_flags(phantom)


def test_a_rank_that_dies_ends_the_run_in_view_and_torchrun_starts_it_again(data, tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, "--max_restarts", 1, "train_acdc.py", *data, *TINY, "--output_dir", folder]
    command += ["--max_iterations", 1000, "--checkpoint_iterations", 2]
    process = start(command)
    try:
        for _ in range(2):
            before = saved_at(folder)
            wait_until(lambda before=before: saved_at(folder) > before, process)
            os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "continue after epoch" in output
    assert "Signal 9 (SIGKILL)" in output
    state = load_checkpoint(folder / "last.pth")
    assert state["iteration"] >= 4 and len(state["random"]) == 2
    names = {path.name for path in folder.iterdir() if not path.name.startswith((".tmp", "config_resumed"))}
    assert names <= {"config.json", "train.log", "events", "metrics.csv", "progress.png", "last.pth", "best.pth"}


def test_sigterm_stops_all_ranks_at_one_step_and_the_same_command_goes_on(data, tmp_path):
    folder = tmp_path / "run"
    command = [*TORCHRUN, "train_acdc.py", *data, *TINY, "--output_dir", folder, "--checkpoint_iterations", 2]
    process = start([*command, "--max_iterations", 1000])
    try:
        wait_until(lambda: saved_at(folder) > 0, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "stopped by SIGTERM after iteration" in output
    stopped = load_checkpoint(folder / "last.pth")["iteration"]
    done = run([*command, "--max_iterations", stopped + 2])
    assert done.returncode == 0, done.stderr
    state = load_checkpoint(folder / "last.pth")
    assert state["iteration"] == stopped + 2
    assert done.stderr.count("done after") == 1  # rank 0 alone tells


def test_more_than_one_gpu_in_a_process_points_to_torchrun(data, tmp_path, run_script):
    done = run_script("train_acdc.py", *data, *TINY, "--n_gpu", 2, "--output_dir", tmp_path / "run")
    assert done.status == 1 and "torchrun --nproc_per_node 2" in done.error


def test_bn_of_cpus_is_not_synchronised(data, tmp_path, run_script):
    done = run_script("train_acdc.py", *data, *TINY, "--sync_bn", "--output_dir", tmp_path / "run")
    assert done.status == 1 and "--sync_bn" in done.error


def saved_at(folder: Path) -> int:
    path = folder / "last.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def process_of_rank(torchrun: int, rank: int) -> int:
    """Return the process id of a rank that torchrun started."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")
