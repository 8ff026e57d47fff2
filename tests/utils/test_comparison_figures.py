"""The figures of a comparison show every method and case, and survive what is missing."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets import Picture, Volume
from tests.comparison_runs import random_dice, write_run
from tests.utils.test_figures import pixels
from utils.comparison import compare, read_run
from utils.comparison_figures import draw_box_plots, draw_curves, draw_predictions


@pytest.fixture
def runs(tmp_path):
    folders = [write_run(tmp_path / name, random_dice(4, seed)) for seed, name in enumerate("ab")]
    return [read_run(folder, f"$method {folder.name}_{{") for folder in folders]


def test_box_plots_and_curves_show_every_method_and_case_as_far_as_there_are_any(runs, tmp_path):
    (comparison,) = compare(runs)
    draw_box_plots(tmp_path / "all.png", comparison)
    comparison.cases.loc[comparison.cases["case"] == "patient000", "value"] = 0
    draw_box_plots(tmp_path / "moved.png", comparison)
    assert not np.array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "moved.png"))
    comparison.cases["value"] = np.nan
    draw_box_plots(tmp_path / "nothing.png", comparison)
    draw_curves(tmp_path / "curves.png", runs)
    for run in runs:
        run.history = pd.DataFrame()
    draw_curves(tmp_path / "none.png", runs)
    assert pixels(tmp_path / "none.png").std() < pixels(tmp_path / "curves.png").std()


def test_predictions_stand_in_a_row_for_each_case(runs, tmp_path):
    (comparison,) = compare(runs)
    label = np.zeros((3, 60, 50), np.uint8)
    label[:, 20:40, 15:35] = 1
    picture = Picture("$img", np.zeros((1, 60, 50, 3), np.uint8), label[:1])
    volumes = type("Volumes", (list,), {"names": ("case", "$img")})([Volume("case", label / 2, label), picture])
    predictors = {name: SimpleNamespace(segment=lambda volume: volume.label) for name in ("first", "label")}
    draw_predictions(tmp_path / "one.png", comparison, volumes, ["case"], predictors)
    draw_predictions(tmp_path / "two.png", comparison, volumes, ["case", "$img"], predictors)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > 1.5 * one.height and two.width == one.width
