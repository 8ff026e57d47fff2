"""Volumes and slices: their files and their data sets; chance depends on seed, epoch and index alone."""

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import ImageDataset, SliceDataset, VolumeDataset, read_volume, segpc, write_slice, write_volume
from tests.datasets.test_images import write_set


@pytest.mark.parametrize("shape", [(3, 20, 14), (1, 20, 14), (1, 1, 1)])
def test_volumes_and_slices_are_read_as_they_were_written(tmp_path, make_volume, shape):
    volume = make_volume(shape=shape)
    write_volume(tmp_path / "patient001_frame01.npy.h5", volume)
    back = read_volume(tmp_path / "patient001_frame01.npy.h5", 4)
    assert (back.name, back.spacing, back.class_names) == (volume.name, volume.spacing, volume.class_names)
    for array in ("image", "label", "affine"):
        np.testing.assert_array_equal(getattr(back, array), getattr(volume, array))
    assert (back.image.dtype, back.label.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(back.restore(np.kron(back.label, np.ones((1, 2, 2), np.uint8))), back.label)
    with h5py.File(tmp_path / "patient001_frame01.npy.h5") as file:  # what TransUNet's own code reads
        np.testing.assert_array_equal(file["image"][:], volume.image)
    write_slice(tmp_path / "s.npz", volume, shape[0] - 1)
    image, label = (getattr(read_volume(tmp_path / "s.npz", 4, ndim=2), key) for key in ("image", "label"))
    np.testing.assert_array_equal(image, volume.image[-1])
    np.testing.assert_array_equal(label, volume.label[-1])
    with np.load(tmp_path / "s.npz") as file:
        assert (tuple(file["class_names"]), tuple(file["spacing"])) == (volume.class_names, volume.spacing)


def write_arrays(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            file.update(arrays)


GOOD = {"image": np.zeros((2, 5, 4), np.float32), "label": np.zeros((2, 5, 4), np.uint8)}
NAN = np.full((2, 5, 4), np.nan, np.float32)
BAD = {
    "no image": ({"label": GOOD["label"]}, "has no 'image'"),
    "no label": ({"image": GOOD["image"]}, "has no 'label'"),
    "unequal shapes": (GOOD | {"label": np.zeros((2, 4, 5), np.uint8)}, "(2, 4, 5)"),
    "too few axes": ({key: array[0] for key, array in GOOD.items()}, "(5, 4)"),
    "channels": ({key: np.stack([array] * 4, -1) for key, array in GOOD.items()}, "the label has shape"),
    "empty": ({key: array[:0] for key, array in GOOD.items()}, "(0, 5, 4)"),
    "NaN": (GOOD | {"image": NAN}, "40 values"),
    "beyond float32": (GOOD | {"image": np.full((2, 5, 4), 1e300)}, "infinite"),
    "fraction": (GOOD | {"label": np.full((2, 5, 4), 0.5)}, "whole numbers"),
    "NaN label": (GOOD | {"label": NAN}, "whole numbers"),
    "id too high": (GOOD | {"label": np.full((2, 5, 4), 4, np.uint8)}, "--num_classes"),
    "greys": (GOOD | {"label": np.repeat([[[0] * 4], [[255] * 4]], 5, 1)}, "values are 0, 255; store 0, 1, 2"),
    "negative id": (GOOD | {"label": np.full((2, 5, 4), -1)}, "-1"),
    "complex": (GOOD | {"image": np.zeros((2, 5, 4), complex)}, "complex"),
    "text": (GOOD | {"label": np.full((2, 5, 4), b"a")}, "numbers"),
}


@pytest.mark.parametrize("ending", [".npy.h5", ".npz"])
@pytest.mark.parametrize("case", BAD)
def test_unfit_contents_are_refused(tmp_path, refused, case, ending):
    arrays, words = BAD[case]
    path = tmp_path / f"patient001_frame01{ending}"
    write_arrays(path, **arrays)
    refused(lambda: read_volume(path, 4), path, words)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("spacing", (1.0, 2.0)),
        ("spacing", (1.0, 0.0, 1.0)),
        ("spacing", (1.25, 1.5, 8.0)),  # of x, y, z, and the affine says otherwise
        ("affine", np.eye(3)),
        ("class_names", (1, 2, 3)),
    ],
)
def test_unfit_attributes_are_refused(tmp_path, refused, make_volume, attribute, value):
    path = tmp_path / "v.h5"
    write_volume(path, make_volume())
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    refused(lambda: read_volume(path), path, attribute)


def test_volumes_come_by_the_list_and_are_read_when_asked_for(prepared, refused):
    dataset = VolumeDataset(prepared / "test_vol_h5", prepared / "lists", "val", 4)
    assert dataset.names == ["patient003_frame01", "patient003_frame09"]
    assert [volume.name for volume in dataset] == dataset.names
    assert dataset[-1].name == "patient003_frame09"
    (prepared / "test_vol_h5" / "patient003_frame01.npy.h5").write_bytes(b"")
    assert dataset[1].label is not None
    refused(lambda: dataset[0], "patient003_frame01")
    (prepared / "test_vol_h5" / "patient003_frame01.h5").touch()
    words = "patient003_frame01.h5: ", " is the same volume ", "keep one"
    refused(lambda: VolumeDataset(prepared / "test_vol_h5", prepared / "lists", "val", 4), *words)


def test_mtunets_files_are_read_as_they_are_unless_a_slice_is_of_another_shape(tmp_path, make_volume, refused, caplog):
    """Keys img and label, entries with ending, a list called valid, validation as slices."""
    root = tmp_path / "mtunet"
    for part, case in (("train", "001"), ("valid", "019")):
        volume = make_volume(f"case_{case}", (12, 20, 14))
        (root / part).mkdir(parents=True)
        names = [f"case_{case}_sliceED_{z}.npz" for z in range(12)]
        for z, name in enumerate(names):
            np.savez(root / part / name, img=volume.image[z].astype(np.float64), label=volume.label[z])
        (root / f"{part}.txt").write_text("\n".join(sorted(names)))
    volume = make_volume("case_002")
    (root / "test").mkdir()
    np.savez(root / "test" / "case_002_volume_ED.npz", img=volume.image, label=volume.label.astype(np.float32))
    (root / "test.txt").write_text("case_002_volume_ED.npz\n")

    slices = SliceDataset(root, root, "train", 4, 32)
    assert len(slices) == 12 and slices[0]["image"].shape == (1, 32, 32)
    val = VolumeDataset(root, root, "val", 4)
    assert val.names == ["case_019_volume_ED"]
    np.testing.assert_array_equal(val[0].image, make_volume("case_019", (12, 20, 14)).image)
    for folder in (root, root / "test"):
        test = VolumeDataset(folder, root, "test", 4)
        assert test.names == ["case_002_volume_ED"]
        np.testing.assert_array_equal(test[0].label, volume.label)
        assert (test[0].spacing, test[0].affine, test[0].class_names, test[0].label.dtype) == (None, None, (), "u1")
    assert not caplog.text
    (root / "valid.txt").write_text((root / "valid.txt").read_text().replace("case_019_sliceED_5.npz\n", ""))
    assert len(VolumeDataset(root, root, "val", 4)[0].image) == 11
    assert "slice 5 of case_019_volume_ED is missing" in caplog.text
    np.savez(root / "valid" / "case_019_sliceED_7.npz", img=np.zeros((5, 5)), label=np.zeros((5, 5)))
    refused(lambda: VolumeDataset(root, root, "val", 4)[0], "case_019_sliceED_7.npz", "(5, 5)")


def _open(prepared, **changes):
    arguments = {"split": "train", "num_classes": 4, "img_size": 32, "augment": True, "seed": 5} | changes
    return SliceDataset(prepared / "train_npz", prepared / "lists", **arguments)


def test_without_augmentation_a_sample_is_the_slice_resized(prepared):
    dataset = _open(prepared, augment=False, img_size=20)
    assert [dataset[i]["name"] for i in (0, 3)] == ["patient001_frame01_slice000", "patient001_frame09_slice000"]
    image, label = dataset.read(4)
    sample = dataset[4]
    assert (len(dataset), sample["image"].dtype, sample["label"].dtype) == (12, torch.float32, torch.int64)
    # The rows are as many as before; of the columns, the first and the last stay where they are.
    np.testing.assert_allclose(sample["image"][0][:, [0, -1]], image[:, [0, -1]], atol=1e-5)
    np.testing.assert_array_equal(sample["label"][:, [0, -1]], label[:, [0, -1]])


@pytest.mark.parametrize("kind", ["slices", "images"])
def test_samples_do_not_depend_on_workers_and_order_but_on_epoch_and_seed(prepared, kind):
    data = write_set(prepared / "images", [str(number) for number in range(9)])

    def open_set(seed):
        if kind == "slices":
            return _open(prepared, seed=seed)
        return ImageDataset(segpc.INFO, data, data / "lists", "train", 3, 32, augment=True, photometric=True, seed=seed)

    def samples(loader):
        batches = list(loader)
        return [torch.cat([batch[key] for batch in batches]) for key in ("image", "label")]

    dataset = open_set(5)
    alone = DataLoader(dataset, batch_size=4)
    shared = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True)
    by_epoch = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        by_epoch.append(samples(alone))
        assert all(map(torch.equal, samples(shared), by_epoch[epoch]))
    first = by_epoch[0][0]
    assert not torch.equal(first, by_epoch[1][0])
    again = open_set(5)
    backwards = torch.stack([again[i]["image"] for i in reversed(range(len(again)))][::-1])
    assert torch.equal(backwards, first) and torch.equal(again[-1]["image"], first[-1])
    assert not torch.equal(samples(DataLoader(open_set(6), batch_size=4))[0], first)


def test_what_is_kept_in_memory_is_bounded_and_changes_no_sample(prepared, monkeypatch):
    read, kept = _open(prepared), _open(prepared)
    image, label = read.read(0)
    assert kept.keep(2**30) == len(kept)
    assert kept.keep(5 * (image.nbytes + label.nbytes)) == 5
    for epoch in (0, 1):
        for dataset in (read, kept):
            dataset.set_epoch(epoch)
        for key in ("image", "label"):
            assert all(torch.equal(read[i][key], kept[i][key]) for i in range(-1, 12))
    monkeypatch.setattr(kept, "read", lambda index: pytest.fail(f"sample {index} was read again"))
    _ = kept[4]
    with pytest.raises(pytest.fail.Exception, match="sample 5"):
        _ = kept[5]
