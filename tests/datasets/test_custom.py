"""Data of the user's own: the forms in which they come, how they are prepared and divided, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from datasets import custom, read_scan, read_volume
from datasets.custom import info_of, prepare
from datasets.lists import divide, read_list
from datasets.preprocessing import Scale, preprocessing_from_dict
from datasets.raw_forms import JSON, recognise
from tests.conftest import ROOT, write_lists

NAMES = ("a", "b", "c d", "é")
LABEL = np.zeros((8, 6, 5), np.uint8)  # (x, y, z)
LABEL[2:6, 1:4, 1:3], LABEL[2:4, 3:5, 3] = 1, 2


def scan(path: Path, array: np.ndarray, sides=(1.0, 1.0, 3.0), shift: float = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-sides[0], -sides[1], sides[2], 1.0])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def image(seed: int, channels: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 5, (*LABEL.shape, channels)) + 100 * LABEL[..., None]
    return (noise if channels > 1 else noise[..., 0]).astype(np.int16)


def write_json(folder: Path, **content) -> None:
    (folder / JSON).write_text(json.dumps(content), encoding="utf-8")


def decathlon(folder: Path, channels: int = 1, modality: str = "MRI") -> Path:
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in NAMES]
    for seed, pair in enumerate(pairs):
        scan(folder / pair["image"], image(seed, channels))
        scan(folder / pair["label"], LABEL)
    labels = {"0": "background", "1": "organ", "2": "tumour"}
    write_json(folder, labels=labels, modality={str(c): modality for c in range(channels)}, training=pairs)
    return folder


def nnunet(folder: Path, channels: int = 2) -> Path:
    for seed, name in enumerate(NAMES):
        for c in range(channels):
            scan(folder / f"imagesTr/{name}_{c:04d}.nii.gz", image(seed, channels)[..., c])
        scan(folder / f"labelsTr/{name}.nii.gz", LABEL)
    names = {str(c): f"T{c + 1}" for c in range(channels)}
    write_json(folder, labels={"background": 0, "organ": 1, "tumour": 2}, channel_names=names, file_ending=".nii.gz")
    return folder


def folders(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        scan(folder / f"images/{name}.nii.gz", image(seed))
        scan(folder / f"labels/{name}.nii.gz", np.array([0, 7, 9], np.int16)[LABEL])
    return folder


def pictures(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        for kind, array in (("images", np.clip(image(seed)[..., 2], 0, 255)), ("masks", 255 * (LABEL[..., 2] > 0))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(folder / kind / f"{name}.png")
    return folder


def listed_pictures(folder: Path) -> Path:
    pictures(folder)
    pairs = [{"image": f"images/{name}.png", "label": f"masks/{name}.png"} for name in NAMES]
    write_json(folder, labels={"cell": 255}, modality={"0": "microscope"}, training=pairs)
    return folder


@pytest.mark.parametrize(
    ("make", "form", "channels", "classes"),
    [
        (decathlon, "Decathlon", ("MRI",), ("organ", "tumour")),
        (lambda folder: decathlon(folder, 4), "Decathlon", ("MRI",) * 4, ("organ", "tumour")),
        (nnunet, "nnU-Net, version 2", ("T1", "T2"), ("organ", "tumour")),
        (folders, "no dataset.json", ("channel 0",), ("class 1", "class 2")),
        (pictures, "no dataset.json", ("red", "green", "blue"), ("class 1",)),
        (listed_pictures, "Decathlon", ("red", "green", "blue"), ("cell",)),
    ],
    ids=["decathlon", "decathlon, 4D", "nnunet", "folders", "pictures", "listed pictures"],
)
def test_each_form_is_said_and_prepared_like_the_named_sets(tmp_path, caplog, refused, make, form, channels, classes):
    caplog.set_level("INFO")
    raw, out = make(tmp_path / "raw"), tmp_path / "out"
    assert prepare(raw, out) == list(NAMES)
    info = info_of(out, fold=1)
    assert (info.name, info.channels, info.class_names, info.folds) == ("out", channels, classes, 4)
    for words in (form, "cases       4: a, b, c d, é", *channels, "8 x 6" if info.planar else "5 x 6 x 8", "4 folds"):
        assert words in caplog.text
    assert read_list(info.list_dir, "val") and len(read_list(info.list_dir, "train")) == 3
    if info.planar:
        np.testing.assert_array_equal(np.asarray(Image.open(out / "masks/é.png")), LABEL[..., 2] > 0)
        refused(lambda: prepare(raw, out, window=(0, 1)), "pictures, but --axis")
        return
    volume = read_volume(out / "test_vol_h5/c d.npy.h5")
    assert info.preprocessing.orientation == "LPS" and volume.spacing == (3, 1, 1)  # across the coarsest spacing
    assert volume.image.shape == (5, 6, 8, *((len(channels),) if len(channels) > 1 else ()))
    np.testing.assert_array_equal(volume.label, LABEL.T)
    assert volume.class_names == classes and (volume.image.min(), volume.image.max()) == pytest.approx((0, 1), abs=1e-6)
    files = sorted((raw / ("images" if make is folders else "imagesTr")).glob("c d*"))
    np.testing.assert_array_equal(read_scan(files[0], info.preprocessing).image, volume.image)  # as predict.py reads it
    scan(next(raw.glob("labels*/c d.nii.gz")), 0 * LABEL)  # corrected after it was prepared
    prepare(raw, out)
    assert not read_volume(out / "test_vol_h5/c d.npy.h5").label.any()
    if make is folders:  # one case less, and one fold less
        for path in raw.rglob("é*"):
            path.unlink()
        assert prepare(raw, out, folds=3) == [*NAMES][:3] and not [*out.rglob("é*"), *out.glob("lists/fold_3/*")]
    refused(lambda: prepare(raw, out, window=(0, 1)), "preprocessing ", "--overwrite")
    refused(lambda: prepare(make(tmp_path / "other"), out), "was prepared with source", "--overwrite")
    write_json(out, labels={})  # raw data of another set
    refused(lambda: prepare(raw, out, overwrite=True), "is not from a prepared folder")
    (out / JSON).unlink()
    refused(lambda: prepare(raw, out), "files of another preparation")


def test_flags_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, refused):
    raw, out = folders(tmp_path / "raw"), tmp_path / "out"
    refused(lambda: prepare(raw, out, window=(0, np.inf)), "--window 0 inf")
    refused(lambda: prepare(raw, out, class_names=["organ", ""]), "1 to 100 letters")
    refused(lambda: prepare(raw, out, splits=Path("lists"), test=25), "leave --folds, --test and --seed out")
    assert not out.exists()


def test_ct_is_clipped_to_the_foreground_of_cases_that_do_not_test_and_flags_say_otherwise(tmp_path, refused):
    raw = decathlon(tmp_path / "raw", modality="CT")
    scan(raw / "imagesTr/a.nii.gz", 100 * image(0))
    write_lists(tmp_path / "lists", train=["b", "é"], val=["c d"], test=["a"])
    prepare(raw, tmp_path / "ct", splits=tmp_path / "lists", axis="sagittal")
    info = info_of(tmp_path / "ct")
    inside = np.concatenate([image(seed)[LABEL > 0] for seed in (1, 2, 3)])
    assert info.preprocessing.window == pytest.approx(np.percentile(inside, (0.5, 99.5)), abs=1e-3)
    assert info.preprocessing.orientation == "PIL" and info.splits == ("train", "val", "test")
    rotating = [{"test": NAMES[i : i + 1], "val": [NAMES[i - 1]], "train": [NAMES[i - 2]]} for i in range(4)]
    (tmp_path / "splits.json").write_text(json.dumps(rotating))
    refused(lambda: prepare(raw, tmp_path / "rotating", splits=tmp_path / "splits.json"), "--window LOW HIGH")
    prepare(raw, tmp_path / "z", normalize="zscore")
    zscore = info_of(tmp_path / "z").preprocessing
    assert zscore.scales == (Scale("deviations", -4, 4),) and preprocessing_from_dict(zscore.to_dict()) == zscore
    expected = np.clip((image(1) - image(1).mean()) / image(1).std() / 8 + 0.5, 0, 1).T
    np.testing.assert_allclose(read_scan(raw / "imagesTr/b.nii.gz", zscore).image, expected, atol=1e-6)


def test_a_small_object_on_black_is_not_lost_where_both_percentiles_are_black(tmp_path):
    raw = decathlon(tmp_path / "raw")
    dark = np.zeros((30, 30, 5), np.int16)
    dark[3, 4, 2] = 900
    scan(raw / "imagesTr/a.nii.gz", dark)
    scan(raw / "labelsTr/a.nii.gz", (dark > 0).astype(np.uint8))
    prepare(raw, tmp_path / "out")
    volume = read_volume(tmp_path / "out/test_vol_h5/a.npy.h5")
    np.testing.assert_array_equal(volume.image, volume.label)


def test_masks_of_one_bit_are_read_and_masks_of_1_and_of_255_are_no_two_classes_unless_named(tmp_path, refused):
    raw = pictures(tmp_path / "raw")
    mask = Image.fromarray(LABEL[..., 2] > 0)
    mask.save(raw / "masks/a.png")
    refused(lambda: prepare(raw, tmp_path / "out"), "1 and 255", "--class_names")
    assert prepare(raw, tmp_path / "two", class_names=["one", "other"]) == list(NAMES)
    for name in NAMES:
        mask.save(raw / f"masks/{name}.png")
    assert prepare(raw, tmp_path / "out") == list(NAMES)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/masks/a.png")), LABEL[..., 2] > 0)


def test_values_of_any_size_names_like_slices_and_jpeg_masks_are_taken_as_they_are(tmp_path):
    raw = nnunet(tmp_path / "raw")
    for path in raw.glob("labelsTr/*"):
        scan(path, np.array([0, 500, 600], np.int16)[LABEL])
    replace_label(background=0, right=600, left=500)(raw)
    prepare(raw, tmp_path / "out")
    assert info_of(tmp_path / "out").class_names == ("left", "right")
    np.testing.assert_array_equal(read_volume(tmp_path / "out/test_vol_h5/a.npy.h5").label, LABEL.T)
    for names in ("p_slice_0 p_slice_1 100 100_flip".split(), "s_cell1 s_cell2 t_cell1 t_cell2".split()):
        raw, out = pictures(tmp_path / names[0]), tmp_path / names[3]
        for old, new in zip(NAMES, names, strict=True):
            Image.open(raw / f"masks/{old}.png").save(raw / f"masks/{new}.jpg", quality=50)
            (raw / f"masks/{old}.png").unlink()
            (raw / f"images/{old}.png").rename(raw / f"images/{new}.png")
        assert sorted(prepare(raw, out)) == sorted(names)
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"masks/{names[0]}.png")), LABEL[..., 2] > 0)
        lists = (" ".join(read_list(out / "lists/fold_0", part)) for part in ("train", "val"))
        assert set.isdisjoint(*(set(re.sub("_cell[0-9]|_flip", "", names).split()) for names in lists))


def test_patients_are_divided_once_and_never_into_two_parts():
    names = [f"p{patient}_{scan}" for patient in range(11) for scan in range(2)]
    lists = divide(names, 3, 20, pattern="p[0-9]+")
    assert lists == divide(names[::-1], 3, 20, pattern="p[0-9]+") != divide(names, 3, 20, seed=1, pattern="p[0-9]+")
    assert sorted(name for one in lists for name in one["val"]) == sorted({*names} - {*lists[0]["test"]})
    for one in lists:
        owners = [{name.split("_")[0] for name in one[part]} for part in ("train", "val", "test")]
        assert sum(map(len, owners)) == len(set.union(*owners)) == 11 and len(owners[2]) == 2
    assert [len(divide("abcdefgh"[:count], test=test)) for count, test in ((5, 40), (6, 50), (8, 0))] == [3, 3, 5]


def rename_b(raw: Path, name: str) -> None:
    for path in raw.rglob("b*.gz"):
        path.rename(path.with_name(path.name.replace("b", name, 1)))


def replace_label(**labels):
    return lambda raw: write_json(raw, labels=labels, channel_names={"0": "T1", "1": "T2"})


def listed(raw: Path, *names: str, more: tuple[str, ...] = ()) -> None:
    """Write pairs of images and labels, and a list of them and of ``more`` files."""
    pairs = [{"image": f"{name}_i.nii.gz", "label": f"{name}.nii.gz"} for name in names]
    for path in (path for pair in pairs for path in pair.values()):
        scan(raw / path, LABEL)
    pairs += [{"image": path, "label": path} for path in more]
    write_json(raw, labels={"organ": 1, "tumour": 2}, training=pairs)


BAD = {
    "nothing": (lambda raw: shutil.rmtree(raw / "imagesTr") or (raw / JSON).unlink(), ["raw", "expected dataset.json"]),
    "no json": (lambda raw: (raw / JSON).write_text("{"), [JSON, "not a readable JSON file"]),
    "no labels": (lambda raw: write_json(raw, labels={}), [JSON, 'declares no "labels"']),
    "regions": (replace_label(background=0, whole=[1, 2]), ["whole", "regions are not supported"]),
    "ignore": (replace_label(background=0, organ=1, ignore=2), ["ignore"]),
    "too many": (replace_label(**{f"c{i}": i for i in range(301)}), ["300 classes", "1 to 255"]),
    "absent": (lambda raw: write_json(raw, labels={"a": 1}, training=[dict(image="x", label="y")]), ["x", "names it"]),
    "no channel": (lambda raw: write_json(raw, labels={"a": 1}, channel_names={}), [JSON, "its channels are"]),
    "undeclared": (replace_label(background=0, organ=1), ["a.nii.gz", "label values 2", "1 organ"]),
    "no label": (lambda raw: (raw / "labelsTr/a.nii.gz").unlink(), ["a_0000.nii.gz", "no label"]),
    "no image": (lambda raw: [p.unlink() for p in raw.glob("imagesTr/a_*")], ["a.nii.gz", "no image"]),
    "channels": (lambda raw: scan(raw / "imagesTr/a_0001.nii.gz", image(0)[:7]), ["a_0001", "on one grid"]),
    "place": (lambda raw: scan(raw / "imagesTr/a_0001.nii.gz", image(0), shift=9), ["a_0001", "on one grid"]),
    "gap": (lambda raw: [p.rename(raw / "imagesTr/a_0002.nii.gz") for p in raw.rglob("a_0001*")], ["0000, 0002"]),
    "one channel": (lambda raw: (raw / "imagesTr/a_0001.nii.gz").unlink(), ["a_0000", "expected 2"]),
    "grid": (lambda raw: scan(raw / "labelsTr/a.nii.gz", LABEL, (2, 1, 3)), ["a.nii.gz", "resample"]),
    "shape": (lambda raw: scan(raw / "labelsTr/a.nii.gz", LABEL[:5]), ["a.nii.gz", "expected (5, 6, 8)"]),
    "cut": (lambda raw: (raw / "imagesTr/a_0000.nii.gz").write_bytes(b"\x1f\x8b123"), ["a_0000.nii.gz", "truncated"]),
    "one case": (lambda raw: [p.unlink() for n in NAMES[1:] for p in raw.rglob(f"{n}*")], ["1 case", "2 or more"]),
    "twice": (lambda raw: scan(raw / "imagesTr/a_0001.nii", image(0)), ["a_0001.nii", "same name"]),
    "twins": (lambda raw: listed(raw, "a/x", "b/x"), ["is called x, too"]),
    "pictures": (lambda raw: pictures(raw) and listed(raw, "a", more=["images/b.png"]), ["pictures and scans"]),
    "unprintable": (lambda raw: rename_b(raw, "\x07"), ["x07"]),
    "one stem": (lambda raw: rename_b(raw, "c+d"), ["c_d"]),
    "alike": (lambda raw: rename_b(raw, "a_b"), ["a_b"]),
}  # fmt: skip
OF_ONE_CASE = ("no label", "no image", "channels", "place", "gap", "one channel", "grid", "shape", "cut")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written_but_good_cases_where_asked(tmp_path, refused, caplog, case):
    damage, words = BAD[case]
    raw, out = nnunet(tmp_path / "raw"), tmp_path / "out"
    damage(raw)
    refused(lambda: prepare(raw, out), *words)
    assert not out.exists()
    if case in OF_ONE_CASE:
        assert prepare(raw, out, skip_bad=True) == list(NAMES[1:])
        assert all(word in caplog.records[-1].getMessage() for word in ("left out", *words))
        assert not list(out.rglob("a*")) and info_of(out).folds == 3


@pytest.mark.parametrize("values", [range(61, 301), range(20, 400, 20)])
def test_instances_and_greys_are_no_classes(tmp_path, refused, values):
    raw = folders(tmp_path / "raw")
    scan(raw / "labels/a.nii.gz", np.resize([0, *values], LABEL.shape).astype(np.int16))
    refused(lambda: prepare(raw, tmp_path / "out"), raw, "values, [", "name every value with --class_names")


def test_a_coloured_mask_is_refused_and_the_remedy_that_is_named_makes_it_readable(tmp_path, refused, monkeypatch):
    raw = pictures(tmp_path / "raw")
    for path in (raw / "masks").iterdir():
        Image.fromarray(np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[LABEL.max(2)]).save(path)
    page = re.search(r"docs/\S+", refused(lambda: prepare(raw, tmp_path / "out"), "colours such as (255, 0, 0)"))[0]
    (raw / "masks").rename(raw / "coloured_masks")
    (raw / "masks").mkdir()
    monkeypatch.chdir(raw)
    exec(re.search(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)[1], {})
    assert prepare(raw, tmp_path / "out") == list(NAMES)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/masks/é.png")), LABEL.max(2))


def test_a_folder_of_another_kind_is_refused_with_the_command_that_prepares_it(tmp_path, refused):
    refused(lambda: info_of(tmp_path), tmp_path, "prepare_data.py custom")
    refused(lambda: info_of(decathlon(tmp_path / "raw")), "raw", "prepare_data.py custom --raw")
    refused(lambda: prepare(tmp_path / "raw", tmp_path / "raw"), "--out")
    assert recognise(tmp_path / "raw").cases and custom.INFO.fold == 0
