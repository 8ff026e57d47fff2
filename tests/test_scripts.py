"""The scripts as a user runs them: phantom data to a table, and one line for whatever is wrong."""

import csv
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.conftest import SMALL, Outcome

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(phantom, tmp_path) -> Path:
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom, tmp_path / "data"))


def folders(data: Path) -> list[str]:
    return ["--root_path", f"{data}/train_npz", *volume_folders(data)]


def volume_folders(data: Path) -> list[str]:
    return ["--volume_path", f"{data}/test_vol_h5", "--list_dir", f"{data}/lists"]


def test_training_leaves_its_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.json",
        "train.log",
        "events",
        "metrics.csv",
        "progress.png",
        "last.pth",
        "best.pth",
        "results_test",
    }
    assert "epoch 1/300" in (trained / "train.log").read_text()


def test_testing_prints_both_tables_and_writes_every_file(trained, phantom, run_script, tmp_path):
    flags = ["--is_savenii", "--overlays", 2, "--test_save_dir", tmp_path]
    done = run_script("test_acdc.py", "--checkpoint", trained / "best.pth", *volume_folders(phantom), *flags)
    assert done.status == 0, done.error
    for word in (
        "transunet",
        "strict",
        "right ventricle",
        "myocardium",
        "left ventricle",
        "HD95 [voxels]",
        "HD95 [mm]",
    ):
        assert word in done.output
    volumes = len((phantom / "lists/test.txt").read_text().split())
    with open(tmp_path / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {"right ventricle", "myocardium", "left ventricle"}
    assert len(rows) >= 3 * volumes
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_cases"] == len(rows) // 3
    assert len(list((tmp_path / "nifti").glob("*_pred.nii.gz"))) == summary["num_cases"]
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 2 * summary["num_cases"]


def test_testing_twice_gives_the_same_numbers_at_any_batch_size(trained, phantom, run_script, tmp_path):
    results = []
    for batch_size in (1, 7):
        folder = tmp_path / str(batch_size)
        flags = ["--batch_size", batch_size, "--test_save_dir", folder]
        done = run_script("test_acdc.py", "--checkpoint", trained / "best.pth", *volume_folders(phantom), *flags)
        assert done.status == 0, done.error
        results.append((folder / "cases.csv").read_text())
    assert results[0] == results[1]
    assert "found" in results[0] or "spurious" in results[0]  # something was predicted


def test_resume_goes_on_in_the_same_folder(trained, run_script, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    done = run_script("train_acdc.py", "--resume", folder / "last.pth", "--max_iterations", 5)
    assert done.status == 0, done.error
    assert torch.load(folder / "last.pth", weights_only=True)["iteration"] == 5
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3


def test_slices_are_read_again_where_memory_is_short(phantom, run_script, tmp_path):
    flags = ["--cache_gib", "1e-4", "--amp", "bf16", "--output_dir", tmp_path / "run"]
    done = run_script("train_acdc.py", *folders(phantom), *SMALL, *flags)
    assert done.status == 0, done.error
    assert "training samples fit into --cache_gib 0.0001" in done.error
    assert (tmp_path / "run/best.pth").is_file()


def assert_one_line(done: Outcome, *words: object) -> None:
    assert done.status == 1
    lines = [line for line in done.error.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in done.error
    for word in words:
        assert str(word) in lines[0]


def rewrite(path: Path, **changes: np.ndarray | None) -> Path:
    """Change or (None) drop arrays of a volume."""
    with h5py.File(path, "r+") as file:
        for key, value in changes.items():
            del file[key]
            if value is not None:
                file[key] = value
    return path


def damage_missing(data: Path) -> tuple:
    for path in (data / "train_npz").glob("patient001*"):
        path.unlink()
    return "patient001", "prepare"


def damage_truncated(data: Path) -> tuple:
    path = first_validation_volume(data)
    path.write_bytes(path.read_bytes()[:2000])
    return path, "prepare"


def damage_not_hdf5(data: Path) -> tuple:
    path = first_validation_volume(data)
    path.write_text("hello")
    return path, "prepare"


def damage_key(data: Path) -> tuple:
    return rewrite(first_validation_volume(data), label=None), "label"


def damage_shape(data: Path) -> tuple:
    return rewrite(first_validation_volume(data), label=np.zeros((2, 3, 4), np.uint8)), "(2, 3, 4)"


def damage_nan(data: Path) -> tuple:
    path = first_validation_volume(data)
    with h5py.File(path, "r+") as file:
        file["image"][0, 0, 0] = np.nan
    return path, "NaN"


def damage_label(data: Path) -> tuple:
    path = first_validation_volume(data)
    with h5py.File(path, "r+") as file:
        file["label"][0, 0, 0] = 4
    return path, "4", "--num_classes"


def damage_empty_list(data: Path) -> tuple:
    (data / "lists/val.txt").write_text("\n")
    return data / "lists/val.txt", "empty"


def damage_path_in_list(data: Path) -> tuple:
    (data / "lists/val.txt").write_text("../patient003\n")
    return data / "lists/val.txt", "../patient003"


def damage_shared_patient(data: Path) -> tuple:
    (data / "lists/val.txt").write_text("patient001\n")
    return "patient001", "val.txt"


def first_validation_volume(data: Path) -> Path:
    patient = (data / "lists/val.txt").read_text().split()[0]
    return sorted((data / "test_vol_h5").glob(f"{patient}_*"))[0]


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_data_is_one_line_before_anything_is_written(data, run_script, damage):
    words = damage(data)
    done = run_script("train_acdc.py", *folders(data), *SMALL, "--output_dir", data / "run")
    assert_one_line(done, *words)
    assert not (data / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_scale", "huge"], ["huge", "pico"]),
        (["--variant", "ours"], ["ours", "paper", "release"]),
        (["--img_size", "100"], ["img_size", "96", "128"]),
        (["--pretrained", "nowhere.pth"], ["nowhere.pth", "download"]),
        (["--list_dir", "nowhere"], ["nowhere"]),
        (["--root_path", "nowhere"], ["nowhere", "prepare_data.py", "download"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--resume", "nowhere.pth"], ["nowhere.pth"]),
    ],
)
def test_bad_flags_are_one_line(phantom, run_script, tmp_path, flags, words):
    done = run_script("train_acdc.py", *folders(phantom), *SMALL, "--output_dir", tmp_path / "run", *flags)
    assert_one_line(done, *words)
    assert not (tmp_path / "run").exists()


def test_without_weights_the_script_says_what_to_download(phantom, run_script, tmp_path):
    flags = [f for f in SMALL if f not in ("--pretrained", "none")]
    done = run_script("train_acdc.py", *folders(phantom), *flags, "--output_dir", tmp_path / "run")
    assert_one_line(
        done, "pretrained_pth/maxvit/maxvit_rmlp_pico_rw_256_sw-8d82f2c6.pth", "https://", "--pretrained none"
    )


def test_unfit_checkpoints_are_one_line(phantom, run_script, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100])
    for name in ("other.pth", "cut.pth", "absent.pth"):
        done = run_script("test_acdc.py", "--checkpoint", tmp_path / name, *volume_folders(phantom))
        assert_one_line(done, tmp_path / name)


def test_no_room_for_a_checkpoint_is_one_line_and_leaves_nothing_half_written(phantom, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [sys.executable, "train_acdc.py", *folders(phantom), *SMALL, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert_one_line(Outcome(done.returncode, done.stdout, done.stderr), "best.pth", "make room")
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".pth" or path.name.startswith(".tmp")]


def test_odd_volumes_are_no_error(trained, data, run_script):
    path = first_validation_volume(data)
    rewrite(path, image=np.random.rand(1, 70, 41).astype(np.float32), label=np.zeros((1, 70, 41), np.uint8))
    flags = ["--split", "val", "--test_save_dir", data / "results", "--overlays", 1, "--is_savenii"]
    done = run_script("test_acdc.py", "--checkpoint", trained / "last.pth", *volume_folders(data), *flags)
    assert done.status == 0, done.error
    assert (data / "results/summary.json").is_file()
