"""The preview shows what a training sees, of slices and of images."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from datasets import DATASETS
from tests.datasets.test_images import write_set
from utils import preview
from utils.figures import class_colour


@pytest.fixture
def made(tmp_path, prepared):
    """Made-up slices and images: the folder of samples and that of lists."""
    lesions = write_set(tmp_path / "isic", [f"ISIC_{number:07d}" for number in range(20)], ending=".jpg", num_classes=2)
    return {"acdc": (prepared / "train_npz", prepared / "lists"), "isic": (lesions, lesions / "lists")}


def run(made, dataset, output, *more):
    root, lists = made[dataset]
    flags = ["--root_path", root, "--list_dir", lists, "--output", output, "--img_size", 32, *more]
    preview.main([dataset, *map(str, flags)])
    with Image.open(output) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB")).astype(int)


@pytest.mark.parametrize("dataset", ["acdc", "isic"])
def test_a_sheet_shows_every_class(made, tmp_path, dataset):
    sheet = run(made, dataset, tmp_path / "sheets" / f"{dataset}.png", "--count", 5)[:-70]  # without the legend
    for c, name in enumerate(DATASETS[dataset].class_names, 1):
        colour = np.array([255 * part for part in to_rgb(class_colour(c))])
        assert (np.abs(sheet - colour).max(-1) < 8).sum() > 5, name


def test_the_seed_decides_the_sheet_and_wrong_flags_are_refused(made, tmp_path, refused):
    pytest.importorskip("imgaug")
    output = tmp_path / "sheet.png"
    plain, again, other, photometric = (
        run(made, "isic", output, "--count", 1, *more) for more in ((), (), ("--seed", 3), ("--photometric",))
    )
    np.testing.assert_array_equal(plain, again)
    assert not np.array_equal(plain, other) and not np.array_equal(plain, photometric)
    refused(lambda: run(made, "acdc", output, "--photometric"), "--photometric", "grey")
    refused(lambda: run(made, "isic", output, "--split", "val"), "val.txt")
