"""Two processes under torchrun, on the CPU: they train as one, and end, stop and start again as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.test_scripts import folders
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
def one_and_two(tmp_path_factory) -> tuple[dict, dict, Path, Path]:
    """What one process with batches of 4 and two with batches of 2 wrote down."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for command in (
        [sys.executable, "tests/two_ranks.py", folders[0], 4],
        [*TORCHRUN, "tests/two_ranks.py", folders[1], 2],
    ):
        done = run(command)
        assert done.returncode == 0, done.stderr
    return *(torch.load(folder / "steps.pth", weights_only=True) for folder in folders), *folders


def test_the_first_gradient_is_that_of_the_whole_batch(one_and_two):
    one, two, *_ = one_and_two
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-5 * whole, name


def test_memory_is_the_same_on_all_ranks_at_every_step(one_and_two):
    _, two, *_ = one_and_two
    assert len(two["steps"]) == 6
    for step in two["steps"]:
        first, second = step["banks"]
        assert first == second
    assert len({step["banks"][0] for step in two["steps"]}) == 6  # it is written in each


def test_the_memory_of_two_processes_is_that_of_one(one_and_two):
    """Warm-up, K-means and updates, from the tokens of both."""
    one, two, *_ = one_and_two
    assert len(one["pools"]) == 8
    for alone, together in zip(one["pools"], two["pools"], strict=True):
        torch.testing.assert_close(together, alone)


def test_two_processes_train_as_one_with_twice_the_batch(one_and_two):
    one, two, first, second = one_and_two
    losses = [torch.tensor([step["losses"] for step in run["steps"]]) for run in (one, two)]
    # The memory is chosen from by rank: once rounding has exchanged two columns, runs part by a little.
    torch.testing.assert_close(losses[1][:4], losses[0][:4], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[1], losses[0], rtol=3e-2, atol=0)
    states = [load_checkpoint(folder / "run/last.pth") for folder in (first, second)]
    assert [state["iteration"] for state in states] == [6, 6]
    for name, value in states[0]["model"].items():
        if name.endswith("warmup_counter"):
            assert value.item() == states[1]["model"][name].item(), name
    scores = [[row["val_dice"] for row in state["history"]] for state in states]
    assert scores[1][0] == pytest.approx(scores[0][0], abs=1e-3)  # of volumes that two ranks share
    assert scores[1] == pytest.approx(scores[0], abs=5e-2)


@pytest.fixture
def data(phantom) -> list[str]:
    return folders(phantom)


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
    assert "go on after epoch" in output
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
