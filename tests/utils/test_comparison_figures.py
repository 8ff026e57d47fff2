"""The figures of a comparison show every method and case, and survive what is missing."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image

from tests.utils.test_figures import pixels, shows
from utils.comparison_figures import METHOD_COLOURS, example, save_box_plots, save_curves, save_qualitative
from utils.figures import COLOURS


def scores(seed: int, cases: int = 9, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.4, 0.9, (cases, classes, 4))


@pytest.fixture
def volume():
    label = np.zeros((3, 60, 50), np.uint8)
    label[:, 20:40, 15:35] = 1
    label[2, 10:50, 5:45] = 1
    image = np.random.default_rng(0).random(label.shape, np.float32)
    return SimpleNamespace(name="case", image=image, label=label, spacing=None, affine=None, planar=False)


def test_every_method_has_its_boxes_and_dots(tmp_path):
    values = {f"method {i}": scores(i) for i in range(3)}
    save_box_plots(tmp_path / "all.png", ["a", "b", "c"], values, "mm")
    for colour in METHOD_COLOURS[:3]:
        assert shows(pixels(tmp_path / "all.png"), colour)
    moved = dict(values)
    moved["method 2"] = values["method 2"].copy()
    moved["method 2"][0, 0, 0] = 0.1
    save_box_plots(tmp_path / "moved.png", ["a", "b", "c"], moved, "mm")
    assert not np.array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "moved.png"))


@pytest.mark.parametrize("values", [np.full((4, 2, 4), np.nan), scores(0, 1, 2), np.zeros((4, 2, 4))])
def test_boxes_of_little_or_nothing_are_no_error(tmp_path, values):
    save_box_plots(tmp_path / "boxes.png", ["$a$", "b_{"], {"x": values, "y & $z": scores(1, 5, 2)}, "voxels")
    assert pixels(tmp_path / "boxes.png").std() > 0


def test_every_run_has_its_curve(tmp_path):
    def history(offset: float) -> list[dict]:
        return [{"epoch": e, "train_loss": offset + 3 / e, "val_dice": 1 - 1 / e if e % 2 else ""} for e in range(1, 9)]

    runs = {"one": [history(0), history(1)], "two": [history(2)]}
    save_curves(tmp_path / "all.png", runs)
    assert shows(pixels(tmp_path / "all.png"), METHOD_COLOURS[1])
    save_curves(tmp_path / "fewer.png", {**runs, "one": [history(0)]})
    assert not np.array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "fewer.png"))
    save_curves(tmp_path / "nothing.png", {"one": [], "two": [[]]})
    assert pixels(tmp_path / "nothing.png").std() > 0


def test_the_slice_on_which_methods_differ_most_is_shown_cut_out(volume):
    same = volume.label.copy()
    same[2] = 0  # both miss the largest
    other = same.copy()
    other[1, 22:38, 15:35] = 0
    shown = example(volume, {"a": same, "b": other})
    assert shown.title == "case, slice 1"
    assert shown.image.shape == shown.label.shape == shown.predictions["b"].shape
    assert shown.image.shape < volume.image.shape[1:] and shown.label.sum() == 400
    alone = example(volume, {"a": volume.label})
    assert alone.title == "case, slice 2"  # of slices alike, the one with most label


def test_cases_stand_in_rows_and_methods_in_columns(volume, tmp_path):
    prediction = np.zeros_like(volume.label)
    prediction[2, 20:40, 15:35] = 2
    shown = example(volume, {"first": volume.label, "second": prediction})
    save_qualitative(tmp_path / "one.png", [shown], ["box", "core"])
    save_qualitative(tmp_path / "two.png", [shown, shown], ["box", "core"])
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > 1.5 * one.height and two.width == one.width
    panels = np.array_split(pixels(tmp_path / "one.png")[60:-60], 4, axis=1)  # without titles and legend
    assert [shows(panel, COLOURS[0]) for panel in panels] == [False, True, True, False]
    assert [shows(panel, COLOURS[1]) for panel in panels] == [False, False, False, True]


def test_an_image_in_colour_and_an_empty_one_are_shown_too(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (1, 40, 60, 3), np.uint8)
    empty = np.zeros((1, 40, 60), np.uint8)
    picture = SimpleNamespace(name="$img", image=image, label=empty, spacing=None, affine=None, planar=True)
    shown = example(picture, {"only": empty})
    assert shown.title == "$img" and shown.image.shape == (40, 60, 3)
    save_qualitative(tmp_path / "picture.png", [shown], ["lesion"])
    assert pixels(tmp_path / "picture.png").std() > 0
