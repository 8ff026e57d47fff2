"""Synapse: BTCV's folders become slices and volumes with our labels, and a wrong label order is noticed."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets import SliceDataset, VolumeDataset, read_volume, synapse, write_slice, write_volume
from datasets.lists import read_list
from datasets.volumes import Volume
from tests.conftest import ROOT, data_flags, write_lists
from utils import verify

# Boxes (z, y, x) of a body that lies as LAS: the patient's right is at small x. Each organ with its BTCV id.
ORGANS = {
    "liver": (6, np.s_[4:9, 3:14, 1:9]), "spleen": (1, np.s_[5:9, 3:8, 17:22]), "stomach": (7, np.s_[4:8, 9:14, 13:19]),
    "right kidney": (2, np.s_[1:4, 3:6, 4:8]), "left kidney": (3, np.s_[1:4, 3:6, 15:19]),
    "gallbladder": (4, np.s_[2:4, 9:11, 6:8]), "aorta": (8, np.s_[0:10, 4:6, 11:13]),
    "pancreas": (11, np.s_[3:4, 8:12, 9:16]), "esophagus": (5, np.s_[8:10, 6:7, 11:13]),
    "left adrenal gland": (13, np.s_[4:5, 4:5, 15:16]),
}  # fmt: skip
SHAPE = (10, 24, 24)
OUR_IDS = {8: 1, 4: 2, 3: 3, 2: 4, 6: 5, 11: 6, 1: 7, 7: 8}  # of BTCV's ids, by the specification


def body() -> tuple[np.ndarray, np.ndarray]:
    """Return (Hounsfield units int16, BTCV's label ids uint8), both (z, y, x)."""
    label = np.zeros(SHAPE, np.uint8)
    for number, box in ORGANS.values():
        label[box] = number
    return np.random.default_rng(0).integers(-1000, 800, SHAPE).astype(np.int16), label


def write_raw(folder: Path, cases=(1, 5)) -> Path:
    image, label = body()
    affine = np.diag([-0.8, 0.8, 3.0, 1])
    affine[:3, 3] = (12.5, -7, 40)
    for kind, array in (("img", image), ("label", label)):
        (folder / kind).mkdir(parents=True)
        for case in cases:
            file = nibabel.Nifti1Image(np.roll(array, case, 0).T, affine)
            nibabel.save(file, folder / kind / f"{kind}{case:04d}.nii.gz")
    return folder


def ours(label: np.ndarray, order: str = "paper") -> np.ndarray:
    """Return BTCV's ids as the paper's or in the order of other files, from the organs' names alone."""
    mapped = np.zeros_like(label)
    for index, organ in enumerate(synapse.FILE_CLASSES[order], 1):
        if organ in ORGANS:
            mapped[label == ORGANS[organ][0]] = index
    return mapped


def test_voxels_and_labels_arrive_where_they_belong(tmp_path):
    raw = write_raw(tmp_path / "disk" / "Training")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "RawData").symlink_to(tmp_path / "disk")
    assert synapse.prepare(tmp_path / "raw", tmp_path / "out") == ["case0001", "case0005"]
    image, label = body()
    for case in (1, 5):
        volume = read_volume(tmp_path / "out" / "test_vol_h5" / f"case{case:04d}.npy.h5", 9)
        np.testing.assert_allclose(volume.image, np.clip((np.roll(image, case, 0) + 125) / 400, 0, 1), atol=1e-6)
        for theirs in range(14):
            assert (volume.label[np.roll(label, case, 0) == theirs] == OUR_IDS.get(theirs, 0)).all()
        assert volume.class_names == synapse.CLASS_NAMES
        np.testing.assert_allclose(volume.spacing, (3.0, 0.8, 0.8))
        np.testing.assert_allclose(volume.affine, nibabel.load(raw / "img" / f"img{case:04d}.nii.gz").affine, atol=1e-5)
        single = read_volume(tmp_path / "out" / "train_npz" / f"case{case:04d}_slice{SHAPE[0] - 1:03d}.npz", 9, ndim=2)
        np.testing.assert_array_equal(single.image, volume.image[-1])
        np.testing.assert_array_equal(single.label, volume.label[-1])


def test_unfit_raw_folders_are_refused(tmp_path, refused):
    refused(lambda: synapse.prepare(tmp_path / "none", tmp_path / "out"), "none", "download")
    refused(lambda: synapse.prepare(tmp_path, tmp_path / "out"), "img and label", "download")
    raw = write_raw(tmp_path / "raw")
    file = raw / "label" / "label0005.nii.gz"
    content = file.read_bytes()
    file.unlink()
    refused(lambda: synapse.prepare(raw, tmp_path / "out"), "img0005.nii.gz", "label0005.nii.gz is missing")
    file.write_bytes(content[:200])
    refused(lambda: synapse.prepare(raw, tmp_path / "out"), file, "not a readable scan")
    affine = nibabel.load(raw / "img" / "img0005.nii.gz").affine
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE[::-1], 14, np.uint8), affine), file)
    refused(lambda: synapse.prepare(raw, tmp_path / "out"), file, "label id 14", "btcv13")
    assert sorted(p.name for p in (tmp_path / "out" / "test_vol_h5").iterdir()) == ["case0001.npy.h5"]


def test_the_lists_are_those_of_the_field():
    train, test = (read_list(ROOT / synapse.INFO.list_dir, part) for part in ("train", "test_vol"))
    assert test == [f"case{n:04d}" for n in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)]
    assert len(train) == 18 and not set(train) & set(test)
    assert set(train) | set(test) == {f"case{n:04d}" for n in (*range(1, 11), *range(21, 41))}
    assert set(synapse.VALIDATION_CASES) < set(train)


def write_other(folder: Path, order: str) -> Path:
    """Write one case as others do: slices and a volume without class names, in their order of labels."""
    image, label = body()
    volume = Volume("case0005", np.clip((image + 125) / 400, 0, 1).astype(np.float32), ours(label, order))
    write_volume(folder / "test_vol_h5" / "case0005.npy.h5", volume)
    for z in range(len(label)):
        write_slice(folder / "train_npz" / f"case0005_slice{z:03d}.npz", volume, z)
    write_lists(folder / "lists", train=[f"case0005_slice{z:03d}" for z in range(len(label))], test_vol=["case0005"])
    return folder


@pytest.mark.parametrize("order", synapse.FILE_CLASSES)
def test_every_order_becomes_ours(tmp_path, order):
    data, label = write_other(tmp_path, order), ours(body()[1])
    chosen = synapse.INFO.label_order(order, 9)
    volumes = VolumeDataset(data / "test_vol_h5", data / "lists", "test_vol", 9, chosen)
    np.testing.assert_array_equal(volumes[0].label, label)
    assert volumes[0].class_names == synapse.CLASS_NAMES
    stacked = VolumeDataset(data / "train_npz", data / "lists", "train", 9, chosen, only=["case0005"])
    np.testing.assert_array_equal(stacked[0].label, label)
    slices = SliceDataset(data / "train_npz", data / "lists", "train", 9, 24, label_order=chosen)
    assert set(np.unique(slices[5]["label"])) == set(np.unique(label[5]))


def test_ids_beyond_the_order_and_files_of_another_order_are_refused(tmp_path, refused):
    data = write_other(tmp_path / "raw ids", "btcv13")
    merit = VolumeDataset(data / "test_vol_h5", data / "lists", "test_vol", 9, synapse.LABEL_ORDERS["merit"])
    refused(lambda: merit[0], "case0005.npy.h5", "label id 13", "--label_order merit")
    synapse.prepare(write_raw(tmp_path / "raw"), tmp_path / "out")
    refused(lambda: synapse.prepare(tmp_path / "raw", tmp_path / "out", label_order="merit"), "btcv13; add --overwrite")
    ready = tmp_path / "out" / "test_vol_h5" / "case0001.npy.h5"
    refused(lambda: read_volume(ready, 9, synapse.LABEL_ORDERS["transunet"]), ready, "--label_order transunet", "aorta")
    refused(lambda: synapse.INFO.label_order("merit", 14), "--label_order merit")
    refused(lambda: synapse.INFO.label_order("other", 9), "transunet")
    assert synapse.INFO.label_order(None, 14) is None


@pytest.mark.parametrize("taken", ["paper", "transunet", "merit"])
@pytest.mark.parametrize("made", ["paper", "transunet", "merit"])
def test_a_wrong_order_gives_a_warning_and_the_right_one_does_not(tmp_path, capsys, made, taken):
    data = write_other(tmp_path, made)
    (data / "lists/test_vol.txt").unlink()  # has the same case
    assert verify.main(["synapse", *data_flags(data), "--label_order", taken, "--splits", "train"]) == 0
    told = capsys.readouterr().out
    assert ("warning" in told) == (made != taken), told
    for name in synapse.CLASS_NAMES:
        assert name in told


def test_swapped_kidneys_are_found_in_every_orientation():
    label = ours(body()[1])
    left, right = (1 + synapse.CLASS_NAMES.index(f"{side} kidney") for side in ("left", "right"))
    swapped = label.copy()
    swapped[label == left], swapped[label == right] = right, left
    for turned in (np.rot90, np.fliplr, np.flipud, lambda plane: plane):
        views = [np.stack([turned(plane) for plane in planes]) for planes in (label, swapped)]
        assert not synapse.doubtful_places(views[0])
        assert "right kidney" in synapse.doubtful_places(views[1])[0]
    assert not synapse.doubtful_places(np.zeros_like(label))
    assert not synapse.doubtful_sizes(np.bincount(label.ravel(), minlength=9))
