"""Lists name files, and only the files meant; the lists in the repository divide ACDC cleanly."""

import pytest

from datasets import acdc
from datasets.lists import patient_of, read_list, select_files, volume_name
from tests.conftest import ROOT

LISTS = ROOT / "lists"


def _folder(tmp_path, entries, files):
    (tmp_path / "train.txt").write_text("\n".join(entries))
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    for name in files:
        (data / name).touch()
    return data


def names(patients):
    return [f"patient{patient:03d}" for patient in sorted(patients)]


def test_the_lists_are_those_of_the_release_and_of_our_seed_and_name_each_patient_once():
    for folder in ("lists_ACDC", "lists_ACDC_mtunet"):
        parts = [read_list(LISTS / folder, part) for part in ("train", "val", "test")]
        assert [len(part) for part in parts] == [70, 10, 20]
        assert sorted(entry for part in parts for entry in part) == names(range(1, 101))
    train, val, both = (read_list(LISTS / "lists_ACDC", part) for part in ("train", "val", "trainval"))
    assert sorted(train + val) == both
    assert acdc.INFO.selections == {"val": ("train", "val"), "test": ("trainval", "test")}  # no patient unused
    for first in range(1, 100, 20):  # a diagnosis
        assert len({*names(range(first, first + 20))} & {*val}) == 2
    for part, patients in {
        "test": (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95),
        "val": (19, 21, 29, 33, 41, 50, 61, 71, 76, 80),
    }.items():
        assert read_list(LISTS / "lists_ACDC_mtunet", part) == names(patients)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("patient001", ["patient001_frame01_slice2.npz", "patient001_frame01_slice10.npz", "patient001_frame12.npz"]),
        ("patient001_frame01", ["patient001_frame01_slice2.npz", "patient001_frame01_slice10.npz"]),
        ("patient001_frame01_slice2", ["patient001_frame01_slice2.npz"]),
        ("patient0010", ["patient0010_frame01.npz"]),
        ("case_002_volume_ED.npz", ["case_002_volume_ED.npz"]),
        ("case_002", ["case_002_volume_ED.npz"]),
    ],
)
def test_an_entry_names_its_files_in_natural_order_and_blank_lines_are_skipped(tmp_path, entry, expected):
    files = (
        "patient001_frame01_slice10.npz patient001_frame01_slice2.npz patient001_frame12.npz patient0010_frame01.npz "
        "case_002_volume_ED.npz case_0021_volume_ED.npz"
        " .patient001_frame13.npz.77.tmp .patient001_x.npz patient001_x.txt"
    )
    data = _folder(tmp_path, ["", f"{entry}  ", ""], files.split())
    assert [path.name for path in select_files(tmp_path, "train", data)] == expected


def test_unusable_lists_are_refused(tmp_path, refused):
    data, source = _folder(tmp_path, [], ["patient001_a.npz"]), tmp_path / "train.txt"
    refused(lambda: read_list(tmp_path, "val"), tmp_path / "val.txt", "--list_dir")
    for content, word in ((b"\n \n", "empty"), (b"\xff\xfe\x00\x01", "text"), (b"patient001\npatient001", "twice")):
        source.write_bytes(content)
        refused(lambda: read_list(tmp_path, "train"), source, word)
    for entry in ("../patient001", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "patient001/../../x", "a\0b"):
        _folder(tmp_path, ["patient001", entry], [])
        refused(lambda: select_files(tmp_path, "train", data), source, repr(entry), "or a leading dot")
    _folder(tmp_path, ["patient001", "patient001_a"], [])
    refused(lambda: select_files(tmp_path, "train", data), source, "both name")
    _folder(tmp_path, ["patient001", "patient007", "patient008"], [])
    refused(lambda: select_files(tmp_path, "train", data), source, "2 of 3", "patient007, patient008", data)
    refused(lambda: select_files(tmp_path, "train", tmp_path / "none"), tmp_path / "none", "prepare_data.py")


@pytest.mark.parametrize(
    ("name", "volume", "patient"),
    [
        ("patient001_frame01_slice003.npz", "patient001_frame01", "patient001"),
        ("patient001_frame01_slice_3.h5", "patient001_frame01", "patient001"),
        ("case_019_sliceES_4", "case_019_volume_ES", "case_019"),
        ("case0005_slice000", "case0005", "case0005"),
        ("BraTS20_Training_001_slice012.npz", "BraTS20_Training_001", "BraTS20_Training_001"),
        ("volume-4.npy.h5", "volume-4", "volume-4"),
        ("005_slice000", "005", "005"),
        ("ct_train_1001", "ct_train_1001", "ct_train_1001"),
        ("sub-01_ses-2_slice001", "sub-01_ses-2", "sub-01"),
        ("my_slices_003.npz", "my_slices_003", "my_slices_003"),
    ],
)
def test_a_slice_belongs_to_its_volume_and_a_volume_to_its_patient(name, volume, patient):
    assert (volume_name(name), patient_of(name)) == (volume, patient)


def test_a_pattern_finds_the_patient_in_a_name(refused):
    assert patient_of("BraTS-GLI-00012-001_slice003.npz", r"GLI-(\d+)") == "00012"
    assert patient_of("scan7_p003", r"p\d+$") == "p003"
    refused(lambda: patient_of("scan7", r"p\d+"), "scan7", "--patient_pattern")
    refused(lambda: patient_of("scan7", "p("), "--patient_pattern p(", "not a regular expression")


def test_names_are_kept_or_left_out_with_everything_that_they_begin(tmp_path, refused):
    entries = ["volume-4", "case_01_sliceED_0.npz", "case_01_sliceED_1.npz", "sub-1_ses-2"]
    data = _folder(tmp_path, entries, [entry if "." in entry else f"{entry}.npz" for entry in entries])

    def chosen(**names):
        return [path.stem for path in select_files(tmp_path, "train", data, **names)]

    assert chosen(only=["volume-4", "sub-1"]) == ["volume-4", "sub-1_ses-2"]
    assert chosen(without=["case_01", "sub-1_ses-2"]) == ["volume-4"]
    assert len(chosen(only=["case_01_volume_ED"])) == 2
    refused(lambda: chosen(only=["volume"]), "does not name volume", "volume-4", "--cases")
