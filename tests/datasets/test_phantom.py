"""The phantom is a valid data set like ACDC, and its seed decides it."""

import numpy as np
import pytest

from datasets import VolumeDataset, phantom
from datasets.lists import read_list
from tests.conftest import data_flags, run_in_process
from tests.test_scripts import assert_one_line
from utils import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a phantom that the script wrote, and what the script printed."""
    out = tmp_path_factory.mktemp("phantom")
    flags = "--out", out, "--num_patients", 5, 2, 3, "--seed", 1, "--jobs", 1
    return out, run_in_process("prepare_data.py", "phantom", *flags).succeeded().error


def read(out, part):
    return VolumeDataset(out / "test_vol_h5", out / "lists", part, 4)


def test_it_is_a_valid_data_set_with_its_own_lists_and_the_next_commands_are_named(made, capsys):
    out, told = made
    volumes = [volume for part in phantom.INFO.splits for volume in read(out, part)]
    assert [len(read_list(out / "lists", part)) for part in phantom.INFO.splits] == [5, 2, 3]
    assert verify.main(["phantom", *data_flags(out)]) == 0
    printed, slices = capsys.readouterr().out, sum(len(volume.image) for volume in read(out, "train"))
    assert "warning" not in printed and f"train: {slices} slices of 5 patients" in printed
    assert f"python -m utils.verify phantom {' '.join(data_flags(out))}" in told
    assert "--variant stable --pretrained none" in told
    assert len({volume.image.shape for volume in volumes}) > 4 and len({volume.name for volume in volumes}) > 10
    for volume in volumes:
        assert volume.class_names == phantom.INFO.class_names and volume.spacing[0] > 3 * volume.spacing[1]
        assert (volume.image.min(), volume.image.max()) == (0, 1)


def test_seed_and_number_make_the_patient_and_a_new_seed_replaces_all(tmp_path, made):
    phantom.write_phantom(tmp_path, (1, 1, 1), seed=2)
    other = read(tmp_path, "train")[0]
    phantom.write_phantom(tmp_path, (1, 1, 1), seed=1)
    again, first = read(tmp_path, "train")[0], read(made[0], "train")[0]
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)
    for volume in read(tmp_path, "trainval"):
        assert len(list((tmp_path / "train_npz").glob(f"{volume.name}_slice*"))) == len(volume.image)


@pytest.mark.parametrize("flags", ["--num_patients 0 1 1", "--num_patients 1 1", "--seed -1", "--jobs many"])
def test_a_part_without_patients_and_other_wrong_flags_are_refused(tmp_path, run_script, flags):
    done = run_script("prepare_data.py", "phantom", "--out", tmp_path / "out", *flags.split())
    assert_one_line(done, flags.split()[0])
    assert not (tmp_path / "out").exists()
