"""The phantom looks like a prepared ACDC, nests its organs, and brightness alone does not give them away."""

import numpy as np
import pytest
from scipy import ndimage

from datasets import SliceDataset, VolumeDataset, phantom
from datasets.lists import read_list
from utils.verify import full_check, quick_check


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    names = phantom.write_phantom(out, (5, 2, 3), seed=1)
    return out, names


def _volumes(out, *parts):
    return [volume for part in parts for volume in VolumeDataset(out / "test_vol_h5", out / "lists", part, 4)]


def test_it_is_a_sound_data_set_with_its_own_lists(made):
    out, names = made
    assert [len(read_list(out / "lists", part)) for part in ("train", "val", "test")] == [5, 2, 3]
    folders = out / "train_npz", out / "test_vol_h5", out / "lists"
    parts, problems = full_check(*folders, ("train", "val", "test"), 4, phantom.INFO)
    assert problems == []
    assert sorted(volume.name for volume in _volumes(out, "train", "val", "test")) == sorted(names)
    assert all((part.voxels > 0).all() for part in parts)
    slices = SliceDataset(out / "train_npz", out / "lists", "train", 4, 64)
    quick_check(slices, VolumeDataset(*folders[1:], "val", 4), phantom.INFO, out / "lists" / "test.txt")
    assert len(slices) == sum(len(volume.image) for volume in _volumes(out, "train"))


def test_volumes_vary_and_are_anisotropic_and_scaled(made):
    volumes = _volumes(made[0], "train", "val", "test")
    assert len({volume.image.shape for volume in volumes}) > 4
    assert len(made[1]) > 10, "no patient has two frames"
    for volume in volumes:
        assert volume.class_names == phantom.INFO.class_names
        assert volume.spacing[0] > 3 * volume.spacing[1]
        assert (volume.image.min(), volume.image.max()) == (0, 1)


def test_the_left_ventricle_lies_inside_the_myocardium(made):
    for volume in _volumes(made[0], "train", "val", "test"):
        assert set(np.unique(volume.label)) == {0, 1, 2, 3}
        for label in volume.label:
            around = ndimage.binary_dilation(label == 3) & (label != 3)
            assert (label[around] == 2).all()
        for index in (1, 2, 3):
            _, pieces = ndimage.label(volume.label == index, np.ones((3, 3, 3)))
            assert pieces == 1


def test_no_band_of_brightness_is_an_organ(made):
    volumes = _volumes(made[0], "train", "val", "test")
    image = np.concatenate([volume.image.ravel() for volume in volumes])
    label = np.concatenate([volume.label.ravel() for volume in volumes])
    edges = np.linspace(0, 1, 21)
    for index in (1, 2, 3):
        mask = label == index
        hits = np.concatenate([[0], np.cumsum(np.histogram(image[mask], edges)[0])])
        taken = np.concatenate([[0], np.cumsum(np.histogram(image, edges)[0])])
        low, high = np.triu_indices(len(edges), 1)
        dice = 2 * (hits[high] - hits[low]) / (taken[high] - taken[low] + mask.sum())
        assert dice.max() < 0.6


def test_the_seed_and_the_number_make_the_patient(tmp_path, made):
    again, other = (
        phantom.write_phantom(tmp_path / str(seed), (1, 1, 1), seed=seed) and _volumes(tmp_path / str(seed), "train")[0]
        for seed in (1, 2)
    )
    first = _volumes(made[0], "train")[0]
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_a_new_seed_replaces_what_was_there(tmp_path):
    phantom.write_phantom(tmp_path, (1, 1, 1), seed=1)
    phantom.write_phantom(tmp_path, (1, 1, 1), seed=2)
    folders = tmp_path / "train_npz", tmp_path / "test_vol_h5", tmp_path / "lists"
    _, problems = full_check(*folders, ("train", "val"), 4, phantom.INFO)
    assert problems == []
    for volume in _volumes(tmp_path, "train"):
        assert len(list((tmp_path / "train_npz").glob(f"{volume.name}_slice*"))) == len(volume.image)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 1), (1, 1, -1)])
def test_a_part_without_patients_is_refused(tmp_path, refused, counts):
    refused(lambda: phantom.write_phantom(tmp_path / "out", counts), "num_patients")
    assert not (tmp_path / "out").exists()
