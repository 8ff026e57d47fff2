"""Volumes of a split, ours and MT-UNet's."""

import numpy as np
import pytest

from datasets import SliceDataset, VolumeDataset


def test_volumes_come_by_the_list_and_are_read_when_asked_for(prepared):
    dataset = VolumeDataset(prepared / "test_vol_h5", prepared / "lists", "val", 4)
    assert dataset.names == ["patient003_frame01", "patient003_frame09"]
    assert [volume.name for volume in dataset] == dataset.names
    assert dataset[-1].name == "patient003_frame09"
    (prepared / "test_vol_h5" / "patient003_frame01.npy.h5").write_bytes(b"")
    assert dataset[1].label is not None
    with pytest.raises(ValueError, match="patient003_frame01"):
        dataset[0]


def test_slices_are_stacked_to_their_volume(prepared, make_volume):
    dataset = VolumeDataset(prepared / "train_npz", prepared / "lists", "val", 4)
    assert dataset.names == ["patient003_frame01", "patient003_frame09"]
    np.testing.assert_array_equal(dataset[0].image, make_volume("patient003_frame01").image)


def test_the_same_volume_twice_is_refused(prepared, refused):
    volumes = prepared / "test_vol_h5"
    (volumes / "patient003_frame01.h5").write_bytes((volumes / "patient003_frame01.npy.h5").read_bytes())
    refused(lambda: VolumeDataset(volumes, prepared / "lists", "val", 4), "patient003_frame01.h5", "keep one")


@pytest.fixture
def mtunet(tmp_path, make_volume):
    """MT-UNet's folders: keys img and label, entries with ending, a list called valid, validation as slices."""
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
    return root


def test_mtunets_files_are_read_as_they_are(mtunet, make_volume):
    slices = SliceDataset(mtunet, mtunet, "train", 4, 32)
    assert len(slices) == 12
    assert slices[0]["image"].shape == (1, 32, 32)
    val = VolumeDataset(mtunet, mtunet, "val", 4)
    assert val.names == ["case_019_volume_ED"]
    np.testing.assert_array_equal(val[0].image, make_volume("case_019", (12, 20, 14)).image)
    for folder in (mtunet, mtunet / "test"):
        test = VolumeDataset(folder, mtunet, "test", 4)
        assert test.names == ["case_002_volume_ED"]
        np.testing.assert_array_equal(test[0].label, make_volume("case_002").label)
        assert test[0].spacing is None


def test_slices_of_unequal_shape_are_refused(mtunet, refused):
    np.savez(mtunet / "valid" / "case_019_sliceED_7.npz", img=np.zeros((5, 5)), label=np.zeros((5, 5)))
    refused(lambda: VolumeDataset(mtunet, mtunet, "val", 4)[0], "case_019_sliceED_7.npz", "(5, 5)")
