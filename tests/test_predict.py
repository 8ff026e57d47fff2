"""Anyone's scan becomes a segmentation on its own grid, by the command and in a notebook."""

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch

from datasets import Preprocessing, read_scan, synapse
from datasets.preprocessing import reorient
from datasets.scan import read_scan_label
from tests.comparison_runs import save_network
from tests.datasets.test_dicom import write_dicom
from tests.datasets.test_scan import ORIENTATIONS, turn
from tests.test_scripts import assert_one_line
from tests.utils.test_evaluation import Threshold
from utils import predictor as predictors
from utils.checkpoint import save_checkpoint
from utils.evaluation import predict_case
from utils.metrics import dice_only

NAMES = synapse.CLASS_NAMES
SIZE = 32


@pytest.fixture
def threshold(tmp_path, monkeypatch) -> Path:
    """A checkpoint from which a network is built that finds class c where c / 8 of the window is."""
    monkeypatch.setattr(predictors, "build_network", lambda *_: Threshold(9, brightest=1))
    return save_network(tmp_path / "best.pth", Threshold(9), "synapse")


def write_scan(folder: Path, name: str, orientation: str, degrees: float = 0.0, plane=(SIZE, SIZE)) -> Path:
    """Write a CT whose organs have the brightness that Threshold knows, and the same as a label beside it."""
    label = np.zeros((9, *plane), np.int16)  # (z, y, x) of LAS
    label[1:5, 3:17, 2:9] = 5
    label[4:8, 20:24, 6:28] = 8
    label[6, 2:8, 25] = 1
    affine = np.eye(4)
    affine[:3, :3] = turn(degrees) * (-0.7, 0.9, 4.0)
    affine[:3, 3] = (60, -40, 1000)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("", np.round(-125 + 400 * label / 8)), ("_label", label)):
        turned, there = reorient(array.astype(np.int16), affine, orientation)
        nibabel.save(nibabel.Nifti1Image(turned.T, there), folder / f"{name}{kind}.nii.gz")
    return folder / f"{name}.nii.gz"


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_what_is_predicted_lies_on_the_patient(threshold, tmp_path, orientation):
    scan = write_scan(tmp_path / "scans", "scan", orientation, degrees=20)
    saved = predictors.Predictor(threshold, "cpu")(scan)
    source = nibabel.load(scan.with_name("scan_label.nii.gz"))
    assert set(np.unique(saved.dataobj)) == {0, 1, 5, 8}
    np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(source.dataobj))
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    assert saved.get_data_dtype() == np.int16  # the scan's


def test_a_scan_of_another_size_is_restored_to_its_own(threshold, tmp_path):
    scan = write_scan(tmp_path, "scan", "PSR", 20, plane=(48, 41))
    predictor = predictors.Predictor(threshold, "cpu")
    volume = predictor.read(scan)
    label = read_scan_label(scan.with_name("scan_label.nii.gz"), volume)
    prediction = predictor.segment(volume)
    assert prediction.shape == label.shape == (9, 48, 41)
    assert (dice_only(prediction, label, 9)[[4, 7]] > (0.88, 0.82)).all()  # a shift of one voxel costs 0.1 more


@pytest.fixture
def predict(threshold, run_script):
    return lambda *flags: run_script("predict.py", "--device", "cpu", "--checkpoint", threshold, *flags)


def test_one_file_and_what_lies_beside_it(predict, tmp_path):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    out = tmp_path / "out" / "seg.nii.gz"
    for count in (3, 2):  # the pictures of the second call alone
        predict("--input", scan, "--output", out, "--overlays", count).succeeded()
    names = ("", "_labels.ctbl", "_labels_itksnap.txt", "_overlays", "_volumes.csv")
    assert {path.name for path in out.parent.iterdir()} == {f"seg{name or '.nii.gz'}" for name in names}
    assert len(list((out.parent / "seg_overlays").glob("*.png"))) == 2
    array = np.asarray(nibabel.load(out).dataobj)
    assert array.shape == nibabel.load(scan).shape
    table = pd.read_csv(out.parent / "seg_volumes.csv")
    voxels = np.bincount(array.ravel(), minlength=9)[1:]
    assert (list(table["class"]), list(table["voxels"])) == (list(NAMES), list(voxels))
    np.testing.assert_allclose(table["millilitres"], voxels * 0.7 * 0.9 * 4 / 1000, atol=1e-3)


def test_colour_tables_name_every_label_as_the_two_programs_expect(tmp_path):
    predictors.write_colour_tables(f"{tmp_path}/", NAMES)
    texts = [(tmp_path / name).read_text() for name in ("labels.ctbl", "labels_itksnap.txt")]
    slicer, itksnap = ([line for line in text.splitlines() if line[0] != "#"] for text in texts)
    colours = set()
    for c, name in enumerate(("background", *NAMES)):
        number, label, *colour, alpha = slicer[c].split()
        assert (int(number), label, int(alpha)) == (c, name.replace(" ", "_"), 255 if c else 0)
        numbers, quoted, rest = itksnap[c].split('"')
        assert quoted == name and not rest
        assert numbers.split() == [str(c), *colour, *["01"[c > 0]] * 3]
        colours.add(tuple(colour))
    assert len(colours) == len(slicer) == len(itksnap) == 9


def test_a_folder_with_a_bad_file_and_other_things_among_scans(predict, tmp_path):
    scans = write_scan(tmp_path / "scans", "a", "RAS").parent
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(scans / "a.nii.gz")), str(scans / "b.mhd"))  # with b.raw
    (scans / "c.nii.gz").write_bytes(b"not a scan")
    (scans / "notes.txt").write_text("of the reader")
    write_dicom(scans / "series")
    done = predict("--input", scans, "--output", tmp_path / "out")
    assert done.status == 1 and "c.nii.gz" in done.error and "1 of 4" in done.error
    (line,) = (line for line in done.error.splitlines() if "left out" in line)
    assert line.endswith(": notes.txt, series/")
    tables = {"labels.ctbl", "labels_itksnap.txt", "volumes.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == tables | {"a.nii.gz", "a_label.nii.gz", "b.mha"}
    assert len(pd.read_csv(tmp_path / "out" / "volumes.csv")) == 3 * 8


def test_a_folder_of_patients_gives_a_segmentation_for_each_of_their_dicom_series(predict, tmp_path):
    folder, out = tmp_path / "patients", tmp_path / "out"
    write_dicom(folder / "a" / "study", first=0)
    write_dicom(folder / "b", SeriesInstanceUID="1.2.5")
    (folder / "LICENSE").write_text("of the archive")
    write_dicom(folder / "reports", [0], SOPClassUID="1.2.840.10008.5.1.4.1.1.481.5", SeriesInstanceUID="1.9")
    predict("--input", folder, "--output", out).succeeded()
    write_dicom(folder / "b" / "more", SeriesInstanceUID="1.2.6")
    done = predict("--input", folder, "--output", out)
    assert done.status == 1 and "contains 2 DICOM series" in done.error and "1 of 2" in done.error
    write_dicom(folder, range(2), SeriesInstanceUID="1.2.7")
    assert_one_line(predict("--input", folder, "--output", out), "contains 4 DICOM series")
    assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}
    assert len(pd.read_csv(out / "volumes.csv")) == len(NAMES)


@pytest.mark.parametrize(("sides", "axis"), [((1, 8, 1.5), "second"), ((8, 1, 1.5), "first"), ((1, 1, 8), None)])
@pytest.mark.parametrize("orientation", [None, "LAS"])
def test_slices_along_another_axis_warn_unless_scans_are_turned(threshold, tmp_path, caplog, sides, axis, orientation):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag((*sides, 1))), tmp_path / "scan.nii")
    predictor = predictors.Predictor(threshold, "cpu")
    predictor.preprocessing = Preprocessing(orientation)
    predictor.read(tmp_path / "scan.nii")
    lines = [record.message for record in caplog.records if "third axis" in record.message]
    assert len(lines) == (axis is not None and orientation is None)
    assert all(f"its {axis} axis" in line for line in lines)


def test_one_of_several_times_is_chosen_and_without_a_voxel_size_no_millilitres_are_given(predict, tmp_path):
    out, times = tmp_path / "out", write_dicom(tmp_path / "times", [0, 1, 0, 1])
    assert_one_line(predict("--input", times, "--output", out), "--time_point 0 to 1")
    predict("--input", times, "--time_point", 1, "--output", out).succeeded()
    assert nibabel.load(out / "times.nii.gz").shape == (12, 9, 2)
    unplaced = write_dicom(tmp_path / "unplaced", ImagePositionPatient=None)
    assert "no volume in millilitres" in predict("--input", unplaced, "--output", out).succeeded().error
    assert pd.read_csv(out / "volumes.csv")["millilitres"].isna().all()


def test_what_cannot_be_done_is_said_in_one_line(predict, threshold, tmp_path):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    before = scan.read_bytes()
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "o.nii.gz"
    for source, output, flags, words in (
        (tmp_path / "none.nii.gz", out, [], ["none.nii.gz", "no such file"]),
        (scan, scan, [], ["would be lost"]),
        (scan.parent, scan.parent, [], ["would be lost"]),
        (scan, scan.parent, [], ["would be lost"]),
        (scan, tmp_path / "o.mhd", [], [".nii.gz", ".mha"]),
        (scan, out, ["--dataset", "acdc"], ["synapse", "name no data set"]),
        (scan.parent, out, [], ["give a folder"]),
        (threshold, out, [], ["best.pth", "not a readable scan"]),
        (scan, out, ["--checkpoint", scan], ["scan.nii.gz", "checkpoint"]),
        ("photo.JPG", tmp_path / "o.png", [], ["a picture", "scans"]),
        (scan, out, ["--batch_size", 0], ["--batch_size", "1 or more"]),
        (scan, tmp_path / "file" / "seg.nii.gz", [], ["file"]),
    ):
        assert_one_line(predict("--input", source, "--output", output, *flags), *words)
    assert scan.read_bytes() == before and not out.exists()


def test_two_scans_are_never_written_to_one_file_and_hidden_files_are_not_read(predict, tmp_path):
    scans = tmp_path / "scans"
    for name in ("a b", "a_b"):
        write_scan(scans, name, "RAS")
    done = predict("--input", scans, "--output", tmp_path / "out")
    assert done.status == 1 and "rename" in done.error
    for path in scans.glob("a_b*"):
        path.unlink()
    bell = (scans / "a b.nii.gz").rename(scans / "\x07.nii.gz")
    assert_one_line(predict("--input", scans, "--output", tmp_path / "out"), "x07.nii.gz", "rename")
    bell.rename(scans / "a b.nii.gz")
    (scans / "._a b.nii.gz").write_bytes(b"of another system")
    (scans / "a b.nii.gz").rename(scans / "A.NII.GZ")
    predict("--input", scans, "--output", tmp_path / "out").succeeded()
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"A.nii.gz", "a_b_label.nii.gz"}


def test_preprocessing_comes_from_the_checkpoint(threshold, tmp_path):
    state = torch.load(threshold, weights_only=True)
    state["data"]["preprocessing"] = Preprocessing("RAS", (0.0, 10.0)).to_dict()
    save_checkpoint(tmp_path / "other.pth", state)
    ours, other = predictors.Predictor(threshold, "cpu"), predictors.Predictor(tmp_path / "other.pth", "cpu")
    assert (ours.preprocessing, other.preprocessing) == (synapse.INFO.preprocessing, Preprocessing("RAS", (0.0, 10.0)))
    scan = write_scan(tmp_path, "scan", "LPS")
    assert not np.array_equal(ours.read(scan).image[3], other.read(scan).image[3])


def test_a_prediction_takes_the_memory_of_a_few_slices(tmp_path):
    """Beside the image and the prediction, whatever the length of the scan."""
    scan = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((128, 128, 300), np.int16), np.eye(4)), scan)
    model = Threshold(9, brightest=1)
    volume = read_scan(scan, synapse.INFO.preprocessing)
    predict_case(model, volume, SIZE, 4)
    tracemalloc.start()
    prediction = predict_case(model, volume, SIZE, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * prediction.nbytes  # as floats, the image alone is 4 times as large
