"""Data of the user's own, from nnU-Net's files to the tables of a cross-validation, by the commands of the docs."""

import nibabel
import numpy as np

from tests.conftest import SMALL, run_in_process
from tests.datasets.test_custom import nnunet, pictures
from tests.test_scripts import assert_one_line


def do(script, *flags):
    return run_in_process(script, *flags).succeeded()


def test_folds_of_two_channels_are_trained_resumed_tested_compared_and_applied(tmp_path, run_script):
    raw, data, run = nnunet(tmp_path / "raw"), tmp_path / "data", tmp_path / "runs" / "mine"
    do("prepare_data.py", "custom", "--raw", raw, "--out", data, "--folds", 2, "--jobs", 1)
    do("utils/verify.py", "custom", "--data", data)
    do("utils/preview.py", "custom", "--data", data, "--count", 1, "--img_size", 32, "--output", tmp_path / "p.png")
    small = [*SMALL, "--output_dir", run]
    do("train_custom.py", "--data", data, *small)
    resumed = do("train_custom.py", "--data", data, "--fold", "all", *small)
    assert "continue after epoch" in resumed.error and (tmp_path / "runs" / "mine_fold1" / "best.pth").is_file()
    flags = "--data", data, "--fold", 1, *small, "--resume", "auto"
    assert_one_line(run_script("train_custom.py", *flags), "--fold 1 does not fit")
    tested = do("test_custom.py", "--data", data, "--fold", "all", "--checkpoint", run / "best.pth", "--overlays", 1)
    assert tested.error.count("best epoch was chosen on 2 of these 2 cases") == 2
    wrong = run_script("test_custom.py", "--data", data, "--checkpoint", tmp_path / "runs" / "mine_fold1" / "best.pth")
    assert wrong.status == 1 and "trained on fold 1: test it with --fold 1" in wrong.error
    table = do("compare.py", run, tmp_path / "runs" / "mine_fold1", "--output_dir", tmp_path / "compared").output
    assert "| sim_mpnet" in table and "mine_fold1" not in table
    methods = (tmp_path / "compared" / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert all(",val,measured,sim_mpnet,val,1,4," in line for line in methods[1:])  # one seed, the cases of two folds

    leak = *small[:-2], "--output_dir", tmp_path / "leak", "--init_from", run / "best.pth", "--resume", "auto"
    assert "trained on 2 of 2 validation cases" in do("train_custom.py", "--data", data, "--fold", 1, *leak).error
    tested = do("test_custom.py", "--data", data, "--fold", 1, "--checkpoint", tmp_path / "leak" / "best.pth")
    assert "was trained on cases of this list (2 of 2" in tested.error
    other = tmp_path / "coronal" / "data"
    do("prepare_data.py", "custom", "--raw", raw, "--out", other, "--axis", "coronal", "--folds", 2)
    flags = "--data", other, "--checkpoint", run / "best.pth"
    assert_one_line(run_script("test_custom.py", *flags), "prepared with orientation")

    do("train_custom.py", "--data", data.rename(tmp_path / "moved"), *small, "--resume", "auto")
    where = tmp_path / "segmented"
    do("predict.py", "--checkpoint", run / "best.pth", "--input", raw / "imagesTr", "--output", where, "--overlays", 1)
    assert {path.name for path in where.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz", "c_d.nii.gz", "é.nii.gz"}
    one, scan = (nibabel.load(path) for path in (where / "a.nii.gz", raw / "imagesTr" / "a_0000.nii.gz"))
    np.testing.assert_array_equal(one.affine, scan.affine)
    one, other = (raw / "imagesTr" / f"a_000{channel}.nii.gz" for channel in (0, 1))
    flags = "--checkpoint", run / "best.pth", "--input", one, "--output"
    assert_one_line(run_script("predict.py", *flags, other), "a_0001.nii.gz is an input and would be lost")
    other.unlink()
    assert_one_line(run_script("predict.py", *flags, tmp_path / "s.nii.gz"), "a_0001.nii.gz")
    assert not (tmp_path / "s.nii.gz").exists()


def test_pictures_are_trained_and_tested_by_the_same_commands(tmp_path, run_script):
    raw, data = pictures(tmp_path / "raw"), tmp_path / "data"
    do("prepare_data.py", "custom", "--raw", raw, "--out", data, "--class_names", "cell", "--jobs", 1, "--test", 25)
    flags = [*SMALL[:-8], *SMALL[-6:], "--batch_size", 2, "--max_iterations", 1, "--select", "test"]
    do("train_custom.py", "--data", data, *flags, "--output_dir", tmp_path / "run")
    do("test_custom.py", "--data", data, "--checkpoint", tmp_path / "run" / "best.pth")
    assert ",cell," in (tmp_path / "run" / "results_test" / "cases.csv").read_text(encoding="utf-8")
    assert_one_line(run_script("train_custom.py", "--data", tmp_path / "none"), "prepare_data.py custom")
    assert_one_line(run_script("test_custom.py"), "--data")
    assert_one_line(run_script("test_custom.py", "--data", data, "--fold", "x"), "--fold x")
