"""The figures of a comparison show every method and case, and survive what is missing."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.comparison_runs import random_dice, write_run
from tests.utils.test_figures import pixels
from utils.comparison import Method, compare, group_runs, read_run
from utils.comparison_figures import draw_box_plots, draw_curves, draw_predictions, example


@pytest.fixture
def volume():
    label = np.zeros((3, 60, 50), np.uint8)
    label[:, 20:40, 15:35] = 1
    label[2, 10:50, 5:45] = 1
    image = np.random.default_rng(0).random(label.shape, np.float32)
    return SimpleNamespace(name="case", image=image, label=label, spacing=None, affine=None, planar=False)


@pytest.fixture
def methods(tmp_path) -> list[Method]:
    folders = [write_run(tmp_path / name, random_dice(4, seed)) for seed, name in enumerate("ab")]
    return group_runs([(f"$method {folder.name}_{{", read_run(folder)) for folder in folders])


def test_every_method_has_its_boxes_and_dots(methods, tmp_path):
    (comparison,) = compare(methods)
    draw_box_plots(tmp_path / "all.png", comparison)
    comparison.cases.loc[comparison.cases["case"] == "patient000", "value"] = 0
    draw_box_plots(tmp_path / "moved.png", comparison)
    assert not np.array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "moved.png"))
    comparison.cases["value"] = np.nan
    draw_box_plots(tmp_path / "nothing.png", comparison)
    assert pixels(tmp_path / "nothing.png").std() > 0


def test_runs_have_curves_as_far_as_there_are_any(methods, tmp_path):
    assert draw_curves(tmp_path / "all.png", methods)
    assert pixels(tmp_path / "all.png").std() > 0
    for method in methods:
        method.runs[0].history.drop(method.runs[0].history.index, inplace=True)
    assert draw_curves(tmp_path / "none.png", methods) == []


def test_the_slice_on_which_methods_differ_most_is_cut_out(volume):
    same = volume.label.copy()
    same[2] = 0  # both methods miss the largest
    other = same.copy()
    other[1, 22:38, 15:35] = 0
    shown = example(volume, {"a": same, "b": other})
    assert shown.title == "case, slice 1"
    assert shown.image.shape == shown.masks["label"].shape == shown.masks["b"].shape
    assert shown.image.shape < volume.image.shape[1:] and shown.masks["label"].sum() == 400
    assert example(volume, {"a": volume.label}).title == "case, slice 2"  # at a tie, the one with most label


def test_cases_stand_in_rows_and_methods_in_columns(methods, volume, tmp_path):
    (comparison,) = compare(methods)
    picture = SimpleNamespace(name="$img", image=np.zeros((1, 40, 60, 3), np.uint8), label=np.zeros((1, 40, 60), int))
    picture.__dict__.update(spacing=None, affine=None, planar=True)
    volumes = Volumes([volume, picture])
    predictors = {name: SimpleNamespace(segment=lambda volume: volume.label) for name in ("first", "second")}
    draw_predictions(tmp_path / "one.png", comparison, volumes, ["case"], predictors)
    draw_predictions(tmp_path / "two.png", comparison, volumes, ["case", "$img"], predictors)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > 1.5 * one.height and two.width == one.width


class Volumes(list):
    names = ("case", "$img")
