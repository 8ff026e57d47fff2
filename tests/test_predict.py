"""Anyone's scan becomes a segmentation on its own grid, by the command and in a notebook."""

import csv
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from datasets import DATASETS, Preprocessing, read_scan, synapse
from datasets.preprocessing import reorient
from datasets.scan import read_scan_label
from networks import SimMPNet
from tests.datasets.test_scan import ORIENTATIONS, places, turn, write_dicom
from utils import predictor as predictors
from utils.checkpoint import save_checkpoint
from utils.evaluation import predict_volume

nibabel = pytest.importorskip("nibabel")

ROOT = Path(__file__).resolve().parents[1]
NAMES = synapse.CLASS_NAMES
SIZE = 32


class Threshold(nn.Module):
    """Finds the class whose number is in the brightness: c / 8 of the window is class c."""

    def __init__(self):
        super().__init__()
        self.config = {"num_classes": 9, "in_channels": 1, "img_size": SIZE}

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        distance = (x - torch.arange(9.0).view(1, 9, 1, 1) / 8).abs()
        return [-distance] * 4


@pytest.fixture
def threshold(tmp_path, monkeypatch) -> Path:
    """A checkpoint from which ``Threshold`` is built."""
    path = tmp_path / "best.pth"
    data = {"dataset": "synapse", "class_names": NAMES, "preprocessing": synapse.INFO.preprocessing.to_dict()}
    save_checkpoint(path, {"model": {}, "network": {}, "data": data})
    monkeypatch.setattr(predictors, "build_network", lambda *_: Threshold())
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint of an untrained Sim-MPNet."""
    model = SimMPNet(9, img_size=64, img_size_dmwla=32, model_scale="pico", feature_dim=16, decoder_feature_dim=16)
    path = tmp_path_factory.mktemp("tiny") / "best.pth"
    data = {"dataset": "synapse", "class_names": NAMES, "preprocessing": synapse.INFO.preprocessing.to_dict()}
    save_checkpoint(path, {"model": model.state_dict(), "network": model.config, "data": data})
    return path


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


@pytest.mark.parametrize("program", ["nibabel", "SimpleITK"])
@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_what_is_predicted_lies_on_the_patient(threshold, tmp_path, run_script, orientation, degrees, program):
    pytest.importorskip(program)
    scan = write_scan(tmp_path / "scans", "scan", orientation, degrees)
    segmentation = predictors.Predictor(threshold)(scan)
    nibabel.save(segmentation, tmp_path / "seg.nii.gz")
    truth = scan.with_name("scan_label.nii.gz")
    expected, found = places(truth, program), places(tmp_path / "seg.nii.gz", program)
    assert expected.keys() == found.keys() == {0, 1, 5, 8}
    for c in expected:
        np.testing.assert_allclose(found[c], expected[c], atol=1e-3)
    source, saved = nibabel.load(truth), nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(source.dataobj))
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    assert saved.get_data_dtype() == np.int16  # the scan's


def test_a_scan_of_another_size_is_restored_to_its_own(threshold, tmp_path):
    scan = write_scan(tmp_path, "scan", "PSR", 20, plane=(48, 41))
    predictor = predictors.Predictor(threshold)
    volume = predictor.read(scan)
    label = read_scan_label(scan.with_name("scan_label.nii.gz"), volume)
    prediction = predictor.segment(volume)
    assert prediction.shape == label.shape == (9, 48, 41)
    for c in (5, 8):
        voxels = [np.argwhere(mask == c).mean(0) for mask in (prediction, label)]
        np.testing.assert_allclose(voxels[0], voxels[1], atol=0.6)
    assert 2 * ((prediction == 5) & (label == 5)).sum() > 0.85 * ((prediction == 5).sum() + (label == 5).sum())


def script(run_script, *arguments):
    return run_script("predict.py", *arguments, "--device", "cpu")


def test_one_file_and_what_lies_beside_it(tiny, tmp_path, run_script):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    out = tmp_path / "out" / "seg.nii.gz"
    done = script(run_script, "--checkpoint", tiny, "--input", scan, "--output", out, "--overlays", 2)
    assert done.status == 0, done.error
    names = {path.name for path in out.parent.iterdir()}
    assert names == {
        "seg.nii.gz", "seg_overlays", "seg_labels.ctbl", "seg_labels_itksnap.txt", "seg_volumes.csv"
    }  # fmt: skip
    assert len(list((out.parent / "seg_overlays").glob("*.png"))) == 2
    saved = nibabel.load(out)
    assert saved.shape == nibabel.load(scan).shape
    with open(out.parent / "seg_volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(NAMES)
    array = np.asarray(saved.dataobj)
    for c, row in enumerate(rows, 1):
        assert int(row["voxels"]) == (array == c).sum()
        assert float(row["millilitres"]) == pytest.approx((array == c).sum() * 0.7 * 0.9 * 4 / 1000, abs=1e-3)


def test_colour_tables_name_every_label_as_the_two_programs_expect(tiny, tmp_path, run_script):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    script(run_script, "--checkpoint", tiny, "--input", scan, "--output", tmp_path / "out")
    slicer = [line.split() for line in (tmp_path / "out" / "labels.ctbl").read_text().splitlines() if line[0] != "#"]
    assert [(int(row[0]), row[1]) for row in slicer] == [
        (c, name.replace(" ", "_")) for c, name in enumerate(("background", *NAMES))
    ]
    assert all(len(row) == 6 and all(0 <= int(v) <= 255 for v in row[2:]) for row in slicer)
    assert [int(row[5]) for row in slicer] == [0] + [255] * 8
    assert len({tuple(row[2:5]) for row in slicer}) == 9
    lines = [x for x in (tmp_path / "out" / "labels_itksnap.txt").read_text().splitlines() if x[0] != "#"]
    for c, (line, name) in enumerate(zip(lines, ("background", *NAMES), strict=True)):
        numbers, quoted, rest = line.split('"')
        assert quoted == name and not rest
        values = [float(v) for v in numbers.split()]
        assert len(values) == 7 and values[0] == c and values[1:4] == [int(v) for v in slicer[c][2:5]]


def test_a_folder_a_dicom_series_and_a_bad_file_among_good_ones(tiny, tmp_path, run_script):
    for name, orientation in (("a", "RAS"), ("b", "PSR")):
        write_scan(tmp_path / "scans", name, orientation)
    (tmp_path / "scans" / "c.nii.gz").write_bytes(b"not a scan")
    flags = "--checkpoint", tiny, "--input", tmp_path / "scans", "--output", tmp_path / "out"
    done = script(run_script, *flags)
    assert done.status == 1 and "c.nii.gz" in done.error and "1 of 5" in done.error
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {
        "a.nii.gz", "a_label.nii.gz", "b.nii.gz", "b_label.nii.gz"
    }  # fmt: skip
    assert len((tmp_path / "out" / "volumes.csv").read_text().splitlines()) == 1 + 4 * 8

    write_dicom(tmp_path / "series")
    out = tmp_path / "series.nii.gz"
    done = script(run_script, "--checkpoint", tiny, "--input", tmp_path / "series", "--output", out)
    assert done.status == 0, done.error
    assert nibabel.load(out).shape == (12, 9, 7)


def test_what_cannot_be_done_is_said_in_one_line(tiny, tmp_path, run_script):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    before = scan.read_bytes()
    for arguments, words in (
        (("--input", tmp_path / "none.nii.gz", "--output", tmp_path / "o.nii.gz"), ("none.nii.gz", "no such file")),
        (("--input", scan, "--output", scan), ("would be lost",)),
        (("--input", scan.parent, "--output", scan.parent), ("would be lost",)),
        (("--input", scan, "--output", scan.parent), ("would be lost",)),
        (("--input", scan, "--output", tmp_path / "o.mha"), (".nii.gz",)),
        (("--input", scan, "--output", tmp_path / "o.nii.gz", "--dataset", "acdc"), ("synapse", "--dataset")),
        (("--input", scan.parent, "--output", tmp_path / "o.nii.gz"), ("give a folder",)),
        (("--input", tiny, "--output", tmp_path / "o.nii.gz"), ("best.pth", "not a readable NIfTI")),
        (("--input", "photo.JPG", "--output", tmp_path / "o.png"), ("a photograph", "scans")),
        (("--input", scan, "--output", tmp_path / "o.nii.gz", "--batch_size", 0), ("--batch_size 0",)),
    ):
        done = script(run_script, "--checkpoint", tiny, *arguments)
        assert done.status == 1
        assert len(done.error.strip().splitlines()) == 1
        assert all(word in done.error for word in words), done.error
    assert scan.read_bytes() == before
    assert not (tmp_path / "o.nii.gz").exists()


def test_two_scans_are_never_written_to_one_file_and_hidden_files_are_none(tiny, tmp_path, run_script):
    for name in ("a b", "a_b"):
        write_scan(tmp_path / "scans", name, "RAS")
    done = script(run_script, "--checkpoint", tiny, "--input", tmp_path / "scans", "--output", tmp_path / "out")
    assert done.status == 1 and "rename" in done.error
    for path in (tmp_path / "scans").glob("a_b*"):
        path.unlink()
    (tmp_path / "scans" / "._a b.nii.gz").write_bytes(b"of another system")
    (tmp_path / "scans" / "a b.nii.gz").rename(tmp_path / "scans" / "A.NII.GZ")
    done = script(run_script, "--checkpoint", tiny, "--input", tmp_path / "scans", "--output", tmp_path / "out")
    assert done.status == 0, done.error
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"A.nii.gz", "a_b_label.nii.gz"}


def test_an_output_that_cannot_be_written_is_found_before_anything_is_predicted(tiny, tmp_path, run_script):
    scan = write_scan(tmp_path / "scans", "scan", "RAS")
    (tmp_path / "file").write_text("no folder")
    done = script(run_script, "--checkpoint", tiny, "--input", scan, "--output", tmp_path / "file" / "seg.nii.gz")
    assert done.status == 1 and len(done.error.strip().splitlines()) == 1 and "file" in done.error


def test_preprocessing_comes_from_the_checkpoint(tiny, tmp_path):
    state = torch.load(tiny, weights_only=True)
    state["data"]["preprocessing"] = Preprocessing("RAS", (0.0, 10.0)).to_dict()
    save_checkpoint(tmp_path / "other.pth", state)
    assert predictors.Predictor(tmp_path / "other.pth").preprocessing == Preprocessing("RAS", (0.0, 10.0))
    assert predictors.Predictor(tiny).preprocessing == DATASETS["synapse"].preprocessing
    scan = write_scan(tmp_path, "scan", "LPS")
    volumes = predictors.Predictor(tmp_path / "other.pth").read(scan), predictors.Predictor(tiny).read(scan)
    assert not np.array_equal(volumes[0].image[3], volumes[1].image[3])


@pytest.mark.slow
def test_memory_stays_bounded_on_a_long_scan(tiny, tmp_path):
    """1000 slices of 512 x 512: 0.5 GiB as stored, 1 GiB as floats; python -m pytest -m slow -k bounded."""
    scan = tmp_path / "long.nii"
    voxels = np.broadcast_to(np.arange(512, dtype=np.int16), (512, 512))
    header = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.diag([0.7, 0.7, 1, 1])).header
    header.set_data_shape((512, 512, 1000))
    with open(scan, "wb") as file:
        header.write_to(file)
        file.write(b"\0" * (352 - file.tell()))
        for _ in range(1000):
            file.write(voxels.tobytes())
    program = """
import resource, runpy, sys
checkpoint, *scans = sys.argv[1:]
peaks = []
for scan in scans:
    sys.argv = ["predict.py", "--checkpoint", checkpoint, "--input", scan, "--output", scan + "_seg.nii"]
    sys.argv += ["--device", "cpu", "--overlays", "2"]
    runpy.run_path("predict.py", run_name="__main__")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
print(peaks[1] - peaks[0])
"""
    command = [sys.executable, "-c", program, str(tiny), str(write_scan(tmp_path, "small", "RAS")), str(scan)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = 512 * 512 * 1000 * 2 / 2**30
    # The scan, its class indices as one byte and as its own type, and half as much again for buffers.
    assert float(done.stdout) < 1.5 * (stored + 1.5 * stored)
    assert nibabel.load(f"{scan}_seg.nii").shape == (512, 512, 1000)


def test_a_scan_s_image_is_read_slice_by_slice(tmp_path):
    """No more than a few slices are ever floats, whatever the length of the scan."""
    scan = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((128, 128, 300), np.int16), np.eye(4)), scan)
    model = Threshold()
    volume = read_scan(scan, synapse.INFO.preprocessing)
    predict_volume(model, volume, SIZE, 4)
    tracemalloc.start()
    prediction = predict_volume(model, volume, SIZE, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * prediction.nbytes  # as floats, the image alone is 4 times as large
