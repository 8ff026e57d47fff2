"""ISIC's masks mean the same in every form, and its division is reproducible."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from datasets import isic
from datasets.image_files import read_classes
from datasets.images import ImageFolder
from datasets.lists import read_list, split_names
from tests.conftest import files

LESION = np.zeros((60, 80), np.uint8)
LESION[20:41, 30:66] = 1
FORMS = {
    "grey": Image.fromarray(LESION * 255),
    "indices": Image.fromarray(LESION),
    "palette": Image.fromarray(LESION * 255).quantize(2),
    "rgba": Image.fromarray(LESION * 255).convert("RGBA"),
    "16 bits": Image.fromarray(LESION.astype(np.uint16) * 65535),
    "12 of 16 bits": Image.fromarray(LESION.astype(np.uint16) * 4095),
}


def saved(picture, *arguments, **options):
    """Return a picture as it comes back from a file of a lossy format."""
    file = io.BytesIO()
    picture.save(file, *arguments, **options)
    return Image.open(file)


def write_raw(folder, ids):
    """Write photographs and masks as the challenge does, with its other files."""
    inputs, truth = folder / isic.IMAGES, folder / isic.TRUTH
    for inner in (inputs, truth):
        inner.mkdir(parents=True)
        (inner / "LICENSE.txt").write_text("free")
    for number, name in enumerate(ids):
        pixels = np.random.default_rng(number).integers(0, 256, (*LESION.shape, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(inputs / f"{name}.jpg")
        Image.fromarray(pixels[:5]).save(inputs / f"{name}_superpixels.png")
        FORMS["grey"].save(truth / f"{name}_segmentation.png")
    return folder


IDS = [f"ISIC_{number:07d}" for number in range(0, 50, 5)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_mask_gives_the_same(tmp_path, form):
    FORMS[form].save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_classes(tmp_path / "mask.png", LESION.shape, (0, 255)), LESION)


def test_the_lists_divide_the_images_reproducibly(tmp_path):
    raw = write_raw(tmp_path / "raw", IDS)
    for name in (isic.IMAGES, isic.TRUTH):  # as some programs unpack an archive
        (tmp_path / "nested" / name).mkdir(parents=True)
        (tmp_path / "nested" / name / name).symlink_to(raw / name)
    isic.prepare(raw, tmp_path / "one")
    isic.prepare(tmp_path / "nested", tmp_path / "two")
    isic.prepare(tmp_path / "one", tmp_path / "three")  # a ready-made folder
    image = raw / isic.IMAGES / f"{IDS[0]}.jpg"
    assert (tmp_path / "one" / "images" / image.name).read_bytes() == image.read_bytes()
    assert {path.stem for path in (tmp_path / "one" / "images").iterdir()} == {*IDS}  # no superpixels
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")
    lists = tmp_path / "one" / "lists"
    parts = [read_list(lists, part) for part in isic.INFO.splits]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert sorted(name for part in parts for name in part) == IDS
    test = ImageFolder(isic.INFO, tmp_path / "one", lists, "test", 2)
    assert test.whole_images == set(parts[2])
    np.testing.assert_array_equal(test[0].label[0], LESION)


BLOB = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(240, 320)), 20) > 0.004


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_the_fringes_that_jpeg_and_resampling_leave_are_tolerated(tmp_path, quality):
    mask = Image.fromarray(BLOB.astype(np.uint8) * 255)
    saved(mask.convert("RGB"), "JPEG", quality=quality).convert("L").save(tmp_path / "mask.png")
    assert (read_classes(tmp_path / "mask.png", BLOB.shape, (0, 255)) != BLOB).mean() < 0.001
    for method in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        mask.resize((1600, 1200), method).resize((320, 240), method).save(tmp_path / "mask.png")
        assert (read_classes(tmp_path / "mask.png", BLOB.shape, (0, 255)) != BLOB).mean() < 0.01


PARTS = BLOB.astype(int) + np.roll(BLOB, 60, 1) + np.roll(BLOB, 60, 0)  # 0 to 3: several classes in one mask
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 0]], np.uint8)[PARTS]


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (Image.fromarray(COLOURS), "adding_a_data_set.md shows, then use prepare_data.py custom"),
        (Image.fromarray(COLOURS).quantize(4), "colours"),
        (saved(Image.fromarray(COLOURS), "JPEG", quality=60), "colours"),
        (Image.fromarray((PARTS * 85).astype(np.uint8)), "grey 85"),
        (Image.fromarray(np.where(PARTS == 1, 30, 255 * (PARTS > 1)).astype(np.uint8)), "area of grey 30"),
        (saved(Image.fromarray((PARTS * 85).astype(np.uint8)), "JPEG", quality=40), "area of grey"),
        (Image.fromarray((PARTS * 1365).astype(np.uint16)), "grey 1365"),
        (Image.fromarray(PARTS.astype(np.uint8)), "brightest grey is 3"),
        (Image.merge("LA", [Image.new("L", (320, 240)), Image.fromarray(BLOB.astype(np.uint8) * 255)]), "alpha"),
    ],
)
def test_several_classes_in_one_mask_are_refused(tmp_path, refused, mask, word):
    mask.save(tmp_path / "mask.png")
    refused(lambda: read_classes(tmp_path / "mask.png", BLOB.shape, (0, 255)), "mask.png", word)


def test_the_official_number_of_images_is_cut_as_specified():
    ids = [f"ISIC_{number:07d}" for number in range(2594)]
    parts = split_names(ids, isic.COUNTS)
    assert [len(part) for part in parts] == [1815, 259, 520]
    assert sorted(name for part in parts for name in part) == ids
    assert split_names(ids[::-1], isic.COUNTS) == parts != split_names(ids, isic.COUNTS, seed=1)


def test_unfit_raw_folders_are_refused(tmp_path, refused):
    raw, out = write_raw(tmp_path / "raw", IDS[:3]), tmp_path / "out"
    image, mask = raw / isic.IMAGES / f"{IDS[1]}.jpg", raw / isic.TRUTH / f"{IDS[1]}_segmentation.png"
    good = mask.read_bytes()
    refused(lambda: isic.prepare(tmp_path / "none", out), tmp_path / "none", "download")
    (tmp_path / "empty").mkdir()
    refused(lambda: isic.prepare(tmp_path / "empty", out), isic.IMAGES, isic.TRUTH)
    for array, words in ((LESION * 60, ("brightest", "60", "255")), (LESION.T * 255, ("80 x 60", "60 x 80"))):
        Image.fromarray(np.ascontiguousarray(array)).save(mask)
        refused(lambda words=words: isic.prepare(raw, out), mask, *words)
    mask.unlink()
    refused(lambda: isic.prepare(raw, out), image, f"{isic.TRUTH}/{mask.name} is missing")
    mask.write_bytes(good)
    image.write_bytes(image.read_bytes()[:700])
    refused(lambda: isic.prepare(raw, out), image, "not a readable image")
    image.unlink()
    refused(lambda: isic.prepare(raw, out), mask, f"{isic.IMAGES}/{image.name} is missing")
