"""The scripts as a user runs them: phantom data to a table, and one line for every error."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, SMALL, Outcome, data_flags, files, flags_of


@pytest.fixture
def data(phantom, tmp_path) -> Path:
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom, tmp_path / "data"))


def assert_one_line(done: Outcome, *words: object) -> None:
    """Expect one line that says what is wrong, and names no flag that its reader does not have."""
    assert done.status == 1
    lines = [line for line in done.error.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in done.error
    for word in words:
        assert str(word) in lines[0]
    if lines[0].endswith(" --help)"):  # argparse's own
        return
    of_this_script = re.sub(r"(torchrun|\w+\.py|train (it )?with) [^;:,]*", "", lines[0])
    assert set(re.findall(r"--\w+", of_this_script)) <= flags_of(done.script)


def test_testing_writes_every_file_and_the_same_scores_in_any_order_and_batch(trained, data, run_script):
    """Over validation and test volumes, forwards one slice at a time and backwards in batches of seven."""
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    checkpoint["model"]["heads.0.bias"][0] -= 10  # else rounding decides whether any organ is found
    torch.save(checkpoint, data / "best.pth")
    patients = [line for name in ("val", "test") for line in (data / f"lists/{name}.txt").read_text().split()]
    scores = []
    for order, size in ((patients, 1), (patients[::-1], 7)):
        (data / "lists/test.txt").write_text("\n".join(order) + "\n")
        out = data / f"results_{size}"
        flags = ["--batch_size", size, "--is_savenii", "--overlays", 2, "--test_save_dir", out]
        flags += ["--checkpoint", data / "best.pth", *data_flags(data)[2:]]
        done = run_script("test_acdc.py", *flags).succeeded()
        scores.append(sorted((out / "cases.csv").read_text().splitlines()[1:]))
    for word in ("transunet", "strict", "right ventricle", "HD95 [voxels]", "HD95 [mm]"):
        assert word in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert len(scores[0]) == 3 * summary["num_cases"] and summary["num_cases"] >= 2
    assert len(list((out / "nifti").glob("*_pred.nii.gz"))) == summary["num_cases"]
    assert len(list((out / "overlays").glob("*.png"))) == 2 * summary["num_cases"]
    assert scores[0] == scores[1]
    assert "found" in str(scores) or "spurious" in str(scores)  # something was predicted


def test_a_test_reads_the_data_of_its_training_and_replaces_an_earlier_test(trained, phantom, run_script, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    volumes, lists = phantom / "test_vol_h5", phantom / "lists"
    done = run_script("test_acdc.py", "--checkpoint", run, "--overlays", 1, "--is_savenii").succeeded()
    assert f"the list {lists / 'test.txt'}, data in {volumes}" in done.error and "optimistic" not in done.error
    results = run / "results_test"
    data = {"volume_path": str(volumes), "list_dir": str(lists), "split": "test"}
    assert json.loads((results / "summary.json").read_text())["data"] == data
    (results / "nifti" / "notes.txt").write_text("of the user")
    run_script("test_acdc.py", "--checkpoint", run / "best.pth", "--prediction", "last").succeeded()
    assert json.loads((results / "summary.json").read_text())["checkpoint"]["prediction"] == "last"
    assert [path.name for name in ("overlays", "nifti") for path in (results / name).iterdir()] == ["notes.txt"]


def test_a_test_without_the_folders_of_its_training_says_what_it_takes(trained, run_script, tmp_path):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    checkpoint["args"] |= {"volume_path": "gone/volumes", "list_dir": "gone/lists"}
    torch.save(checkpoint, tmp_path / "moved.pth")
    done = run_script("test_acdc.py", "--checkpoint", tmp_path / "moved.pth", "--test_save_dir", tmp_path / "out")
    if done.status:  # there is no ACDC on this machine
        assert_one_line(done, "data/ACDC/test_vol_h5: no such folder; give the folder with --volume_path", "--list_dir")
    else:
        assert "gone/volumes does not exist here" in done.error


def test_a_test_on_training_cases_warns(trained, phantom, data, run_script, tmp_path):
    (data / "lists/mixed.txt").write_text("patient001\n" + (data / "lists/test.txt").read_text())
    flags = ["--list_dir", data / "lists", "--split", "mixed", "--test_save_dir", tmp_path]
    done = run_script("test_acdc.py", "--checkpoint", trained / "best.pth", *flags).succeeded()
    assert len(re.findall("was trained on cases of this list .2 of 4, such as patient001_frame01.:", done.error)) == 1


def test_resume_refuses_other_data_and_leaves_the_run_as_it_was(trained, data, run_script, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = files(folder)
    flags = ["--resume", folder / "last.pth", "--max_iterations", 5, *data_flags(data)]
    slices = sorted((data / "train_npz").glob("*.npz"))
    with np.load(slices[0]) as stored:
        np.savez(slices[0], image=stored["image"] / 2, label=stored["label"])
    assert_one_line(run_script("train_acdc.py", *flags), "training sample 1 with mean", "--init_from")
    (data / "lists/train.txt").write_text("patient002\n")
    assert_one_line(run_script("train_acdc.py", *flags), "training case patient001_frame01 then")
    assert files(folder) == before


def test_a_damaged_volume_among_good_ones_is_one_line_and_nothing_is_written(trained, data, run_script):
    """The other kinds of bad data are in utils/test_verify.py."""
    path = sorted((data / "test_vol_h5").glob("patient003_*"))[-1]  # after the first
    path.write_bytes(path.read_bytes()[:2000])
    done = run_script("train_acdc.py", *data_flags(data), *SMALL, "--output_dir", data / "run")
    assert_one_line(done, path, "prepare")
    flags = ["--checkpoint", trained / "last.pth", "--split", "val", "--test_save_dir", data / "results"]
    assert_one_line(run_script("test_acdc.py", *data_flags(data)[2:], *flags), path)
    assert not (data / "run").exists() and not (data / "results/cases.csv").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--img_size", "100"], ["img_size", "96", "128"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--base_lr", "x"], ["--base_lr"]),
        (["--base", "1"], ["--base"]),  # no flag is guessed from its beginning
        (["--max-epochs=3"], ["did you mean --max_epochs?"]),
        (["--network", "unett"], ["did you mean unet?"]),
        (["--network", "attention_unet"], ["--network attention_unet does not take --columns_per_cluster, "]),
        (["--resume", "nowhere.pth"], ["nowhere.pth"]),
        (["--n_gpu", "2"], ["torchrun --nproc_per_node 2"]),
        (["--sync_bn"], ["--sync_bn"]),
        ([], ["nowhere", "prepare_data.py", "download"]),
    ],
)
def test_bad_flags_are_one_line_before_data_are_read(run_script, tmp_path, flags, words):
    done = run_script("train_acdc.py", "--root_path", "nowhere", *SMALL, "--output_dir", tmp_path / "run", *flags)
    assert_one_line(done, *words)
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_one_line_before_data_are_kept_in_memory(phantom, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.training_set.TrainingSet.keep", lambda *_: pytest.fail("kept data in memory"))
    flags = [f for f in SMALL if f not in ("--pretrained", "none")]
    missing = "pretrained_pth/maxvit/maxvit_rmlp_pico_rw_256_sw-8d82f2c6.pth"
    for given, words in (((), (missing, "https://", "--pretrained none")), (("--pretrained", "no.pth"), ("no.pth",))):
        done = run_script("train_acdc.py", *data_flags(phantom), *flags, *given, "--output_dir", tmp_path / "run")
        assert_one_line(done, "download", *words)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("network", ["unet", "attention_unet"])
def test_without_its_library_a_baseline_says_what_to_install(run_script, phantom, tmp_path, monkeypatch, network):
    for module in ("segmentation_models_pytorch", "monai.networks.nets"):
        monkeypatch.setitem(sys.modules, module, None)  # how a library that is not installed looks
    flags = ["--network", network, *data_flags(phantom), "--img_size", 32, "--output_dir", tmp_path / "run"]
    assert_one_line(run_script("train_acdc.py", *flags), "requirements-baselines.txt", "pip install")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["acdc", "isic", "segpc", "synapse"])
def test_without_flags_best_is_tested_or_its_training_named(trained, phantom, run_script, tmp_path, monkeypatch, name):
    monkeypatch.setattr("utils.arguments.run_folder", lambda info: str(tmp_path / info.name))
    assert_one_line(run_script(f"test_{name}.py"), tmp_path / name / "best.pth", f"train_{name}.py", "--checkpoint")
    if name == "acdc":
        shutil.copytree(trained, tmp_path / name)
        assert f"{tmp_path}/{name}/best.pth" in run_script("test_acdc.py", *data_flags(phantom)[2:]).succeeded().error


WITHOUT_POSIX = """
import multiprocessing, os, runpy, signal, sys

sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))  # None: not there
del os.fork, os.getuid, os.killpg, os.sched_getaffinity
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    flags = sys.argv[1:]
    for path in sorted(path for path in os.listdir() if path.endswith(".py")):
        sys.argv = [path, *(flags if path == "train_acdc.py" else ["--help"])]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, path
"""


def test_scripts_run_without_posix(phantom, tmp_path):
    """Windows is pretended: what it lacks is hidden from all scripts, and from a training and its worker."""
    (tmp_path / "pretend.py").write_text(WITHOUT_POSIX)
    flags = [*data_flags(phantom), *SMALL, "--max_iterations", "1", "--num_workers", "1", "--output_dir", tmp_path]
    command = [sys.executable, tmp_path / "pretend.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be locked on this system") == 1
    assert (tmp_path / "best.pth").exists()
