"""SegPC's cell masks become one mask per image, or one crop per cell, split by image."""

import numpy as np
from PIL import Image

from datasets import segpc
from datasets.image_files import read_image, read_mask
from datasets.images import ImageFolder
from datasets.lists import read_list, split_names
from tests.conftest import ROOT, files

SHAPE = (96, 128)


def cell(top, left, height, width, shape=SHAPE):
    """Return one cell's mask with the challenge's greys: cytoplasm with the nucleus in its upper left corner."""
    mask = np.zeros(shape, np.uint8)
    mask[max(top, 0) : top + height, max(left, 0) : left + width] = 20
    mask[max(top, 0) : top + height // 2, max(left, 0) : left + width // 2] = 40
    return mask


CELLS = [cell(10, 12, 30, 40), cell(24, 40, 30, 30), cell(70, 100, 40, 40)]  # two overlap, one leaves the image


def write_raw(folder, ids=("106", "1798"), cells=CELLS):
    for inner in ("x", "y"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(ids):
        pixels = np.random.default_rng(number).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "x" / f"{name}.bmp")
        for k, mask in enumerate(cells, 1):
            Image.fromarray(mask).save(folder / "y" / f"{name}_{k}.bmp")
    return folder


def union(cells):
    """Return what the masks of one image mean together: nucleus over cytoplasm."""
    cells = np.stack(cells)
    return np.where((cells == 40).any(0), 2, (cells == 20).any(0))


def test_whole_images_hold_the_union_of_their_cells_and_a_ready_made_folder_is_taken_as_it_is(tmp_path, refused):
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    assert segpc.prepare(raw, out) == ["106", "1798"]
    for name in ("106", "1798"):
        np.testing.assert_array_equal(read_mask(out / "masks" / f"{name}.png", SHAPE, 3), union(CELLS))
        assert (out / "images" / f"{name}.bmp").read_bytes() == (raw / "x" / f"{name}.bmp").read_bytes()
    mask = read_mask(out / "masks" / "106.png")
    assert mask[24, 45] == 2 and mask[12, 45] == 1  # the second cell's nucleus on the first one's cytoplasm
    assert segpc.prepare(out, tmp_path / "second") == ["106", "1798"]
    assert files(out) == files(tmp_path / "second")
    refused(lambda: segpc.prepare(out, tmp_path / "crops", crops=True), out / "masks", "one per cell")
    refused(lambda: segpc.prepare(out, out), out, "--out")
    refused(lambda: segpc.prepare(raw, out, crops=True), out, "holds 106", "crops", "--out")


def test_crops_hold_one_cell_each_around_its_nucleus(tmp_path):
    raw, out = write_raw(tmp_path / "raw", ["106"]), tmp_path / "out"
    assert segpc.prepare(raw, out, crops=True) == ["106_cell1", "106_cell2", "106_cell3"]
    image = read_image(raw / "x" / "106.bmp")
    for k, mask in enumerate(CELLS, 1):
        crop, label = read_image(out / f"images/106_cell{k}.png"), read_mask(out / f"masks/106_cell{k}.png")
        assert crop.shape[0] == crop.shape[1] == len(label)
        rows, columns = np.nonzero(mask)
        assert len(label) == max(segpc.CROP_MINIMUM, 2 * np.ptp(rows) + 2, 2 * np.ptp(columns) + 2)
        # Every pixel of the cell, and none of another, where it lay.
        np.testing.assert_array_equal(label[label > 0], mask[mask > 0] // 20)
        np.testing.assert_array_equal(crop[label > 0], image[mask > 0])
        nucleus = np.argwhere(label == 2)
        assert np.abs((nucleus.min(0) + nucleus.max(0) + 1) / 2 - len(label) / 2).max() <= 1
    beyond = read_image(out / "images" / "106_cell3.png")
    assert not beyond[-1].any() and not beyond[:, -1].any()  # the image ends before the crop


def test_a_cell_without_a_nucleus_is_cropped_and_an_empty_mask_is_logged(tmp_path, caplog):
    cells = [np.where(CELLS[0] > 0, 20, 0).astype(np.uint8), np.zeros(SHAPE, np.uint8)]
    raw = write_raw(tmp_path / "raw", ["106"], cells)
    assert segpc.prepare(raw, tmp_path / "crops", crops=True) == ["106_cell1"]
    assert "106_2.bmp: an empty mask" in caplog.text
    assert segpc.prepare(raw, tmp_path / "whole") == ["106"]
    np.testing.assert_array_equal(read_mask(tmp_path / "whole" / "masks" / "106.png"), union(cells))
    (raw / "y" / "106_1.bmp").unlink()  # leaves no cell behind
    assert segpc.prepare(raw, tmp_path / "crops", crops=True) == [*(tmp_path / "crops" / "masks").iterdir()] == []
    segpc.prepare(raw, tmp_path / "whole")
    assert not read_mask(tmp_path / "whole" / "masks" / "106.png").any()


def test_the_challenges_folders_make_the_lists_and_unlabelled_images_are_logged(tmp_path, caplog):
    raw = tmp_path / "raw"
    write_raw(raw / "train" / "train", [str(number) for number in range(100, 110)], CELLS[:1])
    write_raw(raw / "validation", ["7", "70"], CELLS[:1])
    for name in ("8", "9"):  # images without masks
        Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(raw / "validation" / "x" / f"{name}.bmp")
    names = segpc.prepare(raw, tmp_path / "out", crops=True)
    assert "2 of 4 images have no mask" in caplog.text and "8, 9" in caplog.text
    assert len(names) == 12
    train, val, test = (read_list(tmp_path / "out" / "lists", part) for part in ("train", "val", "test"))
    assert (len(train), len(val), test) == (8, 2, ["7", "70"])
    for part in ("validation", "train/train"):  # one by one they make the same lists
        segpc.prepare(raw / part, tmp_path / "parts", crops=True)
    assert [read_list(tmp_path / "parts" / "lists", part) for part in ("train", "val", "test")] == [train, val, test]
    out = tmp_path / "out"
    parts = [ImageFolder(segpc.INFO, out, out / "lists", part, 3) for part in ("train", "val", "test")]
    assert sorted(name for part in parts for name in part.names) == sorted(names)


def test_unfit_raw_folders_are_refused(tmp_path, refused):
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    mask = raw / "y" / "106_2.bmp"
    refused(lambda: segpc.prepare(tmp_path / "none", out), tmp_path / "none", "download")
    (tmp_path / "empty").mkdir()
    refused(lambda: segpc.prepare(tmp_path / "empty", out), tmp_path / "empty", "x/<id>.bmp", "masks/<id>.png")
    for array, words in (
        (CELLS[0].T, ("128 x 96", "96 x 128")), (CELLS[0] + 200, ("240", "0, 20, 40")), (CELLS[0] // 2 * 3, ("60",)),
        (np.where(CELLS[0] == 20, 30, CELLS[0]), ("area of grey 30", "0, 20, 40")),
    ):  # fmt: skip
        Image.fromarray(array.copy()).save(mask)
        refused(lambda words=words: segpc.prepare(raw, out), mask, *words)
    mask.write_bytes(mask.read_bytes()[:500])
    refused(lambda: segpc.prepare(raw, out), mask, "not a readable image")
    mask.rename(raw / "y" / "9999_1.bmp")
    refused(lambda: segpc.prepare(raw, out), "9999_1.bmp", "no image for this mask")
    (raw / "y" / "9999_1.bmp").unlink()
    write_raw(raw / "valid", ["106"])
    refused(lambda: segpc.prepare(raw, out), raw / "x", "Call its folder train or valid")
    write_raw(tmp_path / "two" / "train", ["106"])
    valid = write_raw(tmp_path / "two" / "valid", ["106"])
    refused(lambda: segpc.prepare(tmp_path / "two", out), valid / "x" / "106.bmp", "is called 106, too")
    assert not (out / "masks" / "106.png").exists()


def test_the_lists_are_the_challenges_images_divided_by_our_seed():
    train, val, test = (read_list(ROOT / segpc.INFO.list_dir, part) for part in segpc.INFO.splits)
    assert (len(train), len(val), len(test)) == (238, 60, 200)
    assert len({*train, *val, *test}) == 498
    assert split_names(reversed([*val, *train]), segpc.COUNTS) == [train, val]
