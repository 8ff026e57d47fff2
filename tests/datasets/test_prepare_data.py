"""The script: what it makes, what it says next, how it ends on bad input."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments):
    command = [sys.executable, "prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_phantom_and_the_commands_that_come_next(tmp_path):
    done = _run("phantom", "--out", tmp_path / "out", "--num_patients", 1, 1, 1, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    for folder in ("train_npz", "test_vol_h5", "lists"):
        assert list((tmp_path / "out" / folder).iterdir())
    said = done.stderr + done.stdout
    where = f"--root_path {tmp_path}/out/train_npz --volume_path {tmp_path}/out/test_vol_h5"
    assert f"python -m utils.verify phantom {where} --list_dir {tmp_path}/out/lists" in said
    assert f"python train_acdc.py {where}" in said


def test_bad_raw_data_end_with_one_line_and_status_1(tmp_path):
    bad = tmp_path / "raw" / "patient001_frame01.h5"
    bad.parent.mkdir()
    bad.write_bytes(b"not HDF5")
    done = _run("acdc", "--raw", bad.parent, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(bad) in done.stderr
    assert not list(tmp_path.glob("out/*/*"))
