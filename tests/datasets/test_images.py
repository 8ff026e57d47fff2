"""Images and masks of any form are read as they are meant, and training and testing see the same of them."""

import tracemalloc

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from datasets.image_files import common_bits, image_of, read_image, read_mask
from datasets.images import ImageDataset, ImageFolder, read_picture, resize_image, resize_mask, shrunk_size
from datasets.preprocessing import ColourPreprocessing, preprocessing_from_dict
from datasets.segpc import INFO


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth image of which no two corners are alike: uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(rng.uniform(3, 9) * x + rng.uniform(3, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def write_set(folder, names, shape=(40, 56), ending=".png", num_classes=3):
    """Write a prepared folder in which an image's red is 100 times its label, and a list of its names."""
    for inner in ("images", "masks", "lists"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        for c in range(1, num_classes):
            top, left = rng.integers(0, shape[0] - 12), rng.integers(0, shape[1] - 12)
            label[top : top + 12, left : left + 12] = c
        image = scene(*shape, seed=number)
        image[..., 0] = 100 * label
        Image.fromarray(image).save(folder / "images" / f"{name}{ending}")
        Image.fromarray(label).save(folder / "masks" / f"{name}.png")
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def test_grey_palette_and_alpha_become_rgb(tmp_path):
    grey = scene(20, 30)[..., 0]
    rgb = np.repeat(grey[..., None], 3, axis=2)
    alpha = Image.fromarray(np.full_like(grey, 40))
    forms = {
        "grey": Image.fromarray(grey),
        "palette": Image.fromarray(grey).convert("P"),
        "rgba": Image.merge("RGBA", [*Image.fromarray(rgb).split(), alpha]),
        "grey and alpha": Image.merge("LA", [Image.fromarray(grey), alpha]),
    }
    for name, form in forms.items():
        form.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), rgb, err_msg=name)
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), np.where(rgb > 127, 255, 0))


@pytest.mark.parametrize(
    ("ending", "orientation"),
    [*((e, o) for e in ("jpg", "png", "tif") for o in range(1, 9)), ("bmp", 1), ("tiff", 6), ("jpeg", 6), ("PNG", 6)],
)
def test_every_format_is_read_upright_by_its_exif_orientation(tmp_path, orientation, ending):
    upright = scene(300, 420)
    # How a camera stores it: what undoes the orientation.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "images" / f"a.{ending}"
    (tmp_path / "masks").mkdir()
    path.parent.mkdir()
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    np.testing.assert_allclose(read_image(path).astype(int), upright, atol=16 if ending.startswith("j") else 0)
    Image.fromarray(upright[..., 0] // 128).save(tmp_path / "masks" / "a.png")
    (tmp_path / "train.txt").write_text("a\n")
    sample = ImageDataset(INFO, tmp_path, tmp_path, "train", 2, 32)[0]
    expected = ColourPreprocessing().normalise(resize_image(upright, (32, 32)))
    assert np.abs(sample["image"].numpy() - expected).max() < 0.15


@pytest.mark.parametrize("form", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_mask_has_its_indices_in_every_form(tmp_path, form):
    mask = np.random.default_rng(0).integers(0, 2 if form == "1" else 3, (20, 30)).astype(np.uint8)
    file = Image.fromarray({"1": mask.astype(bool), "I;16": mask.astype(np.uint16)}.get(form, mask))
    if form == "P":
        file.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    elif form not in ("1", "I;16"):
        file = file.convert(form)
    file.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (20, 30), 3), mask)


def test_a_palette_of_greys_is_applied_to_a_mask_and_any_other_is_ignored(tmp_path):
    for palette, expected in (([2, 2, 2, 0, 0, 0, 1, 1, 1], [2, 0, 1]), ([0, 0, 9, 0, 9, 0, 9, 0, 0], [0, 1, 2])):
        file = Image.fromarray(np.arange(3, dtype=np.uint8).repeat(4).reshape(3, 4))
        file.putpalette(palette)
        file.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (3, 4), 3)[:, 0], expected)


def write_deep(path, image, bits):
    """Write the values of an 8-bit image in 16 bits, of which ``bits`` are in use."""
    values = image.astype(np.uint16) << bits - 8 | image >> 16 - bits  # what an 8-bit image of it would keep, and more
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values, isVector=image.ndim == 3), str(path))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [9, 12, 16])
def test_9_to_16_bits_are_read_like_the_same_picture_of_8(tmp_path, caplog, bits, ending):
    for image in (scene(20, 30), scene(20, 30)[..., 0]):
        write_deep(tmp_path / f"a.{ending}", image, bits)
        expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}"), expected)
        assert (f"{bits} bits" in caplog.text) == (bits < 16)  # no other bits without a word


def test_the_bits_in_use_are_those_of_the_whole_set_or_of_the_file_itself(tmp_path, caplog):
    names = ["bright", "dark", "tagged", "ome"]
    for kind in ("deep", "plain"):
        write_set(tmp_path / kind, names)
    for name in names:
        image = scene(40, 56, seed=len(name)) // (1 if name == "bright" else 9)
        Image.fromarray(image).save(tmp_path / "plain/images" / f"{name}.png")
        (tmp_path / "deep/images" / f"{name}.png").unlink()
        write_deep(tmp_path / "deep/images" / f"{name}.tif", image, 12)
    for name, stated in (("tagged", {281: 4095}), ("ome", {270: '<OME><Pixels SignificantBits="12"/></OME>'})):
        values = scene(40, 56, seed=len(name))[..., 0].astype(np.uint16) // 9
        Image.fromarray(values << 4).save(tmp_path / "deep/images" / f"{name}.tif", tiffinfo=stated)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "plain/images" / f"{name}.png")
        assert read_image(tmp_path / "deep/images" / f"{name}.tif").max() == values.max()
    assert not caplog.text
    for kind, size in ((ImageDataset, [32]), (ImageFolder, [])):
        folders = tmp_path / "deep", tmp_path / "plain"
        deep, plain = (kind(INFO, data, data / "lists", "train", 3, *size) for data in folders)
        for one, other in zip(deep, plain, strict=True):
            image, expected = (item["image"] if size else item.image for item in (one, other))
            np.testing.assert_array_equal(image, expected)
    alone = read_picture(tmp_path / "deep/images/dark.tif", preprocessing=ColourPreprocessing(bits=12))  # in prediction
    np.testing.assert_array_equal(alone.image[0], read_image(tmp_path / "plain/images/dark.png"))
    caplog.set_level("INFO")
    for known, reason in ((None, "9 bits of 16, by the largest"), (12, "12 bits of 16, as in training")):
        assert common_bits([tmp_path / "deep/images/dark.tif"], known) == (known or 9)
        assert f"1 image read with {reason}" in caplog.text


def test_pages_are_refused_by_number_and_a_smaller_copy_of_the_first_is_not_a_page(tmp_path, refused):
    pages = [Image.fromarray(scene(20, 30, seed)) for seed in range(3)]
    for ending in ("tif", "png"):
        pages[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=pages[1:])
        refused(lambda ending=ending: read_image(tmp_path / f"a.{ending}"), f"a.{ending}", "3 pages")
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(scene(20, 30), photometric="rgb")
        file.write(scene(10, 15), photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), scene(20, 30))


def test_unfit_files_are_refused_in_one_line(tmp_path, refused):
    image, mask = tmp_path / "image.jpg", tmp_path / "mask.png"
    Image.fromarray(scene(200, 200)).save(image)
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(mask)
    refused(lambda: read_image(tmp_path / "none.jpg"), tmp_path / "none.jpg", "no such file")
    refused(lambda: read_mask(mask, (20, 30), 3), mask, "label id 7", "--num_classes")
    refused(lambda: read_mask(mask, (30, 20), 8), mask, "20 x 30", "30 x 20")
    refused(lambda: read_picture(image, mask, 8), mask, "200 x 200")
    refused(lambda: read_mask(image), image, "JPEG")
    Image.fromarray(scene(30, 30)).save(mask)
    refused(lambda: read_mask(mask), mask, "colours")
    Image.fromarray(np.eye(30, dtype=np.uint8) * 255).save(mask)
    assert "--num_classes" not in refused(lambda: read_mask(mask, (30, 30), 2), mask, "0, 255", "store 0, 1")
    Image.merge("LA", [Image.new("L", (30, 30)), Image.open(mask)]).save(mask)
    refused(lambda: read_mask(mask, (30, 30), 2), mask, "alpha")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.eye(30, dtype=np.uint8)).save(mask, exif=exif)
    refused(lambda: read_mask(mask, (30, 30), 2), mask, "EXIF orientation 3")
    whole = image.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"no image at all\n" * 50, b"GIF89a" + bytes(50)):
        image.write_bytes(content)
        refused(lambda: read_image(image), image, "not a readable image")
    small, other = np.full((4, 4), 200), tmp_path / "other.tif"
    for picture, options, word in (
        (small.astype(np.float32), {}, "floating-point"),
        (small.astype(np.int32) * 500, {}, "100000"),
        (small.astype(np.uint16), {"tiffinfo": {262: 0}}, "8 bits"),  # white is 0
    ):
        Image.fromarray(picture).save(other, **options)
        refused(lambda: read_image(other), other, word)


def test_normalisation_is_that_of_the_weights_and_survives_a_checkpoint(refused):
    image = scene(6, 5)
    for preprocessing in (ColourPreprocessing(), ColourPreprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))):
        out = preprocessing.normalise(image)
        assert out.dtype == np.float32
        expected = [(image[..., c] / 255 - preprocessing.mean[c]) / preprocessing.std[c] for c in range(3)]
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(preprocessing.denormalise(out) * 255, image, atol=1e-3)
        assert preprocessing_from_dict(preprocessing.to_dict()) == preprocessing
    assert ColourPreprocessing().normalise(np.stack([image, image])).shape == (2, 3, 6, 5)
    assert preprocessing_from_dict(ColourPreprocessing(bits=12).to_dict()).bits == 12
    assert "bits" not in ColourPreprocessing().to_dict()  # as earlier versions wrote it
    for bad in ({}, {"mean": (0.5,) * 3}, {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0)}, {"mean": "abc", "std": (1,) * 3}):
        refused(lambda bad=bad: preprocessing_from_dict(bad), "the preprocessing", "is not valid")


def test_a_mask_lies_on_its_image_after_any_change_of_size():
    for size in ((40, 56), (17, 90), (200, 24)):
        image = scene(120, 168)
        mask = (image[..., 0] > 127).astype(np.uint8)
        small, small_mask = resize_image(image, size)[..., 0].astype(int), resize_mask(mask, size)
        clear = np.abs(small - 127) > 25  # away from the edges of the mask
        np.testing.assert_array_equal(small_mask[clear], small[clear] > 127)
        back = resize_mask(small_mask, mask.shape)
        assert (back != mask).mean() < 0.06
        # A step that is shrunk and enlarged stays where it is, not half a pixel off towards the border.
        assert (np.flip(back, (0, 1)) != resize_mask(np.flip(small_mask, (0, 1)).copy(), mask.shape)).mean() < 0.02


def test_a_picture_is_a_volume_of_one_slice(tmp_path):
    image = scene(90, 130)
    Image.fromarray(image).save(tmp_path / "a.b.png")
    picture, mask = read_picture(tmp_path / "a.b.png"), image[..., 0] // 128
    assert (picture.name, picture.label, picture.planar) == ("a.b", None, True)
    assert picture.network_input(32).shape == (1, 3, 32, 32)
    assert picture.network_input(32, slice(1, 2)).shape == (0, 3, 32, 32)
    (restored,) = picture.restore(resize_mask(mask, (32, 32))[None])
    assert restored.dtype == np.uint8 and (restored != mask).mean() < 0.06


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_training_and_testing_see_the_same(tmp_path, ending):
    for shape in ((700, 900), (30, 20)):
        data = write_set(tmp_path, ["1", "2"], shape, ending)
        train = ImageDataset(INFO, data, data / "lists", "train", 3, 48)
        test = ImageFolder(INFO, data, data / "lists", "train", 3)
        for sample, picture in zip((train[0], train[1]), test, strict=True):
            difference = np.abs(sample["image"].numpy() - picture.network_input(48)[0])
            # Only a JPEG is read at a fraction of its size; in grey levels of 255:
            assert 127.5 * difference.mean() < (1.5 if ending == ".jpg" and shape[0] == 700 else 1e-3)
            small = resize_mask(picture.label[0], shrunk_size(shape, 48))
            np.testing.assert_array_equal(sample["label"], resize_mask(small, (48, 48)))


def test_a_large_photograph_costs_little_memory(tmp_path):
    data = write_set(tmp_path, ["large"], (60, 80), ".jpg", 2)
    Image.fromarray(scene(400, 600)).resize((6000, 4000)).save(data / "images" / "large.jpg")
    Image.fromarray(np.ones((4000, 6000), np.uint8)).save(data / "masks" / "large.png", compress_level=1)
    dataset = ImageDataset(INFO, data, data / "lists", "train", 2, 256, augment=True)
    tracemalloc.start()
    sample = dataset[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample["image"].shape == (3, 256, 256)
    assert peak < 2.5 * 6000 * 4000 * 3  # bytes: decoded once and turned into an array, never into float


def test_an_entry_names_its_image_or_its_crops_and_no_other(tmp_path):
    data = write_set(tmp_path, ["1060", "106_cell10", "106_cell2", "ISIC_0000001", "ISIC_0000002", "17"])
    (data / "images" / "notes.txt").touch()
    for entries, found in {
        "106": ["106_cell2", "106_cell10"],
        "17\n1060": ["17", "1060"],
        "ISIC_0000002.png": ["ISIC_0000002"],
        "106_cell10": ["106_cell10"],
    }.items():
        (data / "lists" / "val.txt").write_text(entries)
        folder = ImageFolder(INFO, data, data / "lists", "val", 3)
        assert [picture.name for picture in folder] == folder.names == found
        assert folder[0].class_names == INFO.class_names
        assert folder.whole_images == {image_of(entry) for entry in entries.split()}
        dataset = ImageDataset(INFO, data, data / "lists", "val", 3, 32)
        assert (dataset.names, dataset.whole_images, dataset.source) == (found, folder.whole_images, folder.source)


def test_unusable_folders_are_refused(tmp_path, refused):
    data = write_set(tmp_path, ["1", "2", "3"])
    lists = data / "lists"

    def refuse(*words):
        for kind, size in ((ImageDataset, [32]), (ImageFolder, [])):
            refused(lambda kind=kind, size=size: kind(INFO, data, lists, "train", 3, *size), *words)

    (lists / "train.txt").write_text("1\n1.png\n")
    refuse(lists / "train.txt", "1.png")
    (lists / "train.txt").write_text("1\n2\n3\n")
    (data / "masks" / "2.png").unlink()
    refuse(data / "masks", "1 of 3", "2;")
    Image.fromarray(scene(5, 5)).save(data / "images" / "1.bmp")
    refuse("1.bmp", "1.png", "same name")
    refused(lambda: ImageFolder(INFO, tmp_path / "none", lists, "train", 3), tmp_path / "none", "prepare_data.py")
    (data / "images" / "1.bmp").unlink()
    write_set(tmp_path, ["2"])
    (lists / "train.txt").write_text("2\n")
    refused(lambda: ImageDataset(INFO, data, lists, "train", 2, 32)[0], "2.png", "label id 2", "--num_classes")
