"""Runs that are killed, disks that are full, folders that cannot be written: nothing is lost, and runs repeat."""

import csv
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datasets.files import remove_temporaries
from tests.conftest import ROOT
from tests.mini import assert_same, trainer
from tests.test_scripts import folders
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import RunError

SMALL = (
    "--model_scale pico --pretrained none --img_size 64 --img_size_dmwla 64 --feature_dim 16 --decoder_feature_dim 16 "
    "--columns_per_cluster 20 --warmup_iterations 4 --batch_size 4 --max_epochs 2 --device cpu --deterministic 1"
).split()


@pytest.fixture
def data(phantom) -> list[str]:
    return folders(phantom)


def command(data: list[str], folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "train_acdc.py", *data, *SMALL, "--output_dir", str(folder), *flags]


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_left_alone(data, tmp_path):
    """SIGKILL at moments drawn by chance, data-loader workers, checkpoints at every third iteration."""
    subprocess.run(command(data, tmp_path / "whole", "--num_workers", "0"), cwd=ROOT, check=True, capture_output=True)
    chance = random.Random(int(os.environ.get("KILL_SEED", 0)))
    flags = ("--num_workers", "2", "--checkpoint_iterations", "3", "--resume", "auto")
    last, kills = tmp_path / "killed/last.pth", 0
    while True:
        process = subprocess.Popen(command(data, tmp_path / "killed", *flags), cwd=ROOT, stderr=subprocess.PIPE)
        before = written(last)
        while kills < 2 and process.poll() is None and written(last) == before:
            time.sleep(0.02)
        if process.poll() is None and kills < 2:
            time.sleep(chance.uniform(0, 1))
            process.kill()
            kills += 1
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills == 2
    for name in ("last.pth", "best.pth"):
        assert_same(load_checkpoint(tmp_path / "killed" / name), load_checkpoint(tmp_path / "whole" / name))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in csv.DictReader(file)]


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_loads(tmp_path):
    path = tmp_path / "last.pth"
    state = {"model": {"weight": torch.zeros(2**21)}, "network": {}, "data": {"class_names": ["disc"]}}
    save_checkpoint(path, state | {"number": 0})
    cut, newest = 0, 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            for number in range(newest + 1, newest + 1000):
                save_checkpoint(path, state | {"number": number})
        time.sleep(random.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += any(tmp_path.glob(".tmp*"))
        number = load_checkpoint(path)["number"]
        assert number >= newest
        newest = number
        remove_temporaries(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
    assert cut and newest  # some were killed in the middle, and some had been done


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(data, tmp_path):
    """The same limit on the size of files stops the second run's checkpoint half-way."""
    folder = tmp_path / "run"
    subprocess.run(command(data, folder, "--max_epochs", "1"), cwd=ROOT, check=True, capture_output=True)
    before = load_checkpoint(folder / "last.pth")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    again = command(data, folder, "--resume", "auto", "--max_epochs", "2")
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "make room" in done.stderr
    assert_same(load_checkpoint(folder / "last.pth"), before)
    assert not list(folder.glob(".tmp*"))


def test_a_folder_that_became_read_only_keeps_the_last_checkpoint(tmp_path):
    trainer(tmp_path, "--max_epochs", "1").fit()
    before = load_checkpoint(tmp_path / "last.pth")
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for folder in (tmp_path / "events", tmp_path):
        folder.chmod(0o555)
    for parent in tmp_path.parents:  # another user has to reach it
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    child = os.fork()
    if child == 0:
        status = 2
        try:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anywhere
            trainer(tmp_path, "--resume", "auto", "--max_epochs", "2").fit()
        except (RunError, OSError) as error:
            status = 0 if "ermission" in str(error) else 3
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    for folder in (tmp_path, tmp_path / "events"):
        folder.chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same(load_checkpoint(tmp_path / "last.pth"), before)


def test_events_on_a_full_disk_are_an_error_and_not_a_wait(tmp_path, monkeypatch):
    made = trainer(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
    with pytest.raises(OSError, match="No space"):
        made.fit()


def test_best_is_not_lost_to_a_worse_epoch_after_a_kill_between_its_writing_and_that_of_last(tmp_path):
    """Where the epoch that is done again comes out worse, as it may on a GPU."""
    made = trainer(tmp_path, "--max_epochs", "2", "--keep", "2")
    scores = iter([0.3, 0.5])
    made.validate = lambda: {"val_dice": next(scores)}
    made.fit()
    shutil.copy(tmp_path / "epoch_0001.pth", tmp_path / "last.pth")  # best.pth is of epoch 2 already
    again = trainer(tmp_path, "--resume", "auto", "--max_epochs", "2")
    again.validate = lambda: {"val_dice": 0.4}
    again.fit()
    assert load_checkpoint(tmp_path / "best.pth")["history"][-1]["val_dice"] == 0.5
    assert load_checkpoint(tmp_path / "last.pth")["best_dice"] == 0.5


def test_memory_that_is_out_is_one_line(data, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    flags = ("--img_size", "1024", "--img_size_dmwla", "1024", "--num_workers", "0", "--cache_gib", "0")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command(data, tmp_path / "run", *flags), cwd=ROOT, capture_output=True, text=True, preexec_fn=limit,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "memory is out" in line and "--batch_size 4" in line and "--accumulate" in line and "Traceback" not in line


def test_scores_do_not_depend_on_the_order_of_cases_or_on_what_ran_before(data, tmp_path, run_script):
    folder = tmp_path / "run"
    done = run_script("train_acdc.py", *data, *SMALL, "--max_iterations", "6", "--output_dir", folder)
    assert done.status == 0, done.error
    lists = tmp_path / "lists"
    shutil.copytree(data[data.index("--list_dir") + 1], lists)
    names = [line for name in ("train", "val", "test") for line in (lists / f"{name}.txt").read_text().split()]
    cases = []
    for i, order in enumerate((names, names[::-1], names[::-1])):
        (lists / "test.txt").write_text("\n".join(sorted({n.split("_")[0] for n in order}, key=order.index)) + "\n")
        flags = ["--volume_path", data[3], "--list_dir", lists, "--test_save_dir", tmp_path / str(i)]
        done = run_script("test_acdc.py", "--checkpoint", folder / "last.pth", *flags)
        assert done.status == 0, done.error
        cases.append(sorted((tmp_path / str(i) / "cases.csv").read_text().splitlines()))
    assert cases[0] == cases[1] == cases[2]
    assert len(cases[0]) > 6
