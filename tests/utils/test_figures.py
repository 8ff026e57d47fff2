"""Pictures show the right slices under safe names and survive missing values; previews show what a training sees."""

import numpy as np
import pytest
from PIL import Image

from datasets import DATASETS, Volume
from tests.datasets.test_images import write_set
from utils import figures, preview
from utils.figures import class_rgb, draw_masks, save_overlays, save_picture_overlay, save_progress


@pytest.fixture
def volume():
    label = np.zeros((6, 40, 30), np.uint8)
    label[:, 10:30, 5:25] = 1
    label[:, 15:25, 10:20] = 2
    label[4] = 0
    label[4, 10:14, 5:9] = 1
    image = np.random.default_rng(0).random(label.shape, np.float32)
    return Volume("patient001_frame01", image, label, (10.0, 1.5, 1.5), class_names=("box", "core"))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def shows(picture: np.ndarray, c: int) -> bool:
    return bool((np.abs(picture.astype(int) - class_rgb(c)).max(-1) <= 2).any())


def test_the_worst_slices_are_drawn_worst_first(volume, tmp_path):
    prediction = volume.label.copy()
    prediction[3, :8, :8] = 2
    prediction[1, :3, :3] = 1
    prediction[5, 0, 0] = 1
    paths = save_overlays(tmp_path, volume, prediction, count=2)
    assert [p.name for p in paths] == ["patient001_frame01_slice003.png", "patient001_frame01_slice001.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    volume.image, volume.label = volume.image[3:5], volume.label[3:5]
    paths = save_overlays(tmp_path, volume, volume.label, count=10)  # perfect, and fewer than asked for
    assert [path.name[-7:-4] for path in paths] == ["000", "001"]


def test_label_and_prediction_stand_beside_the_image_in_their_own_colours(volume, tmp_path):
    draw_masks(tmp_path / "a.png", volume, 0, np.where(volume.label == 2, 0, volume.label).astype(np.uint8)[0])
    maps, legend = np.split(pixels(tmp_path / "a.png"), [480])
    panels = np.array_split(maps, 3, axis=1)  # image, label, prediction
    assert [shows(panel, 1) for panel in panels] == [False, True, True]
    assert [shows(panel, 2) for panel in panels] == [False, True, False]
    assert shows(legend, 2)


@pytest.mark.parametrize(
    "change",
    [
        dict(label=np.zeros((1, 40, 30), np.uint8)),
        dict(image=np.zeros((1, 40, 30), np.float32), spacing=None),
        dict(name="../$x$ and $y", class_names=("$x$ and $y", "100 % $")),
    ],
)
def test_unusual_volumes_are_drawn_too_and_in_their_folder(volume, tmp_path, change):
    volume.label, volume.image = volume.label[:1], volume.image[:1]
    for name, value in change.items():
        setattr(volume, name, value)
    prediction = volume.label.copy()
    prediction[0, 0, :20] = 1
    (path,) = save_overlays(tmp_path / "in", volume, prediction, count=1)
    assert pixels(path).std() > 0
    assert [*tmp_path.rglob("*.png")] == [path] and path.resolve().parent == tmp_path.resolve() / "in"


def test_a_photograph_has_its_classes_painted_over_it_in_colours_of_their_own_with_opaque_borders(tmp_path):
    image, mask = np.full((20, 30, 3), 100, np.uint8), np.zeros((20, 30), np.uint8)
    mask[5:15, 5:20] = 2
    save_picture_overlay(tmp_path / "a.png", image, mask)
    painted = pixels(tmp_path / "a.png")
    assert (painted[mask == 0] == 100).all()
    np.testing.assert_array_equal(painted[5, 5], class_rgb(2))
    np.testing.assert_allclose(painted[10, 10], 0.65 * 100 + 0.35 * np.array(class_rgb(2)), atol=1)
    assert len({class_rgb(c) for c in range(1, 256)}) == 255


@pytest.mark.parametrize(("x", "y"), [(-1, -1), (-1, 1), (1, 1), (1, -1)])
def test_a_scan_is_shown_from_its_feet_with_the_front_on_top(volume, tmp_path, x, y):
    """The patient's right and front are bright; they must appear at the left and at the top."""
    volume.affine = np.diag([x, y, 8.0, 1.0])
    volume.spacing, volume.label, volume.image = None, None, np.zeros_like(volume.image)
    volume.image[:, ::y, ::x][:, 20:, 15:] = 1
    (path,) = save_overlays(tmp_path, volume, np.zeros(volume.image.shape, np.uint8), count=1)
    picture = pixels(path)
    dark = picture[:, : picture.shape[1] // 2].max(-1) < 20  # the left panel, and the letters of its titles
    dark = dark[dark.sum(1) > 40][:, dark.sum(0) > 40]
    quarters = [half for rows in np.array_split(dark, 2) for half in np.array_split(rows, 2, axis=1)]
    assert [round(float(quarter.mean())) for quarter in quarters] == [0, 1, 1, 1]


def test_every_series_of_the_progress_is_drawn_and_a_missing_value_is_not(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure))
    values = {"k": 50, "lr": 1e-4, "cluster_use": 0.5, "gate": 0.5, "gate_spatial_1": 0.1, "note": "x"}
    rows = [{"epoch": e, "train_loss": 9 / e, "val_dice": 1 - 1 / e, **values} for e in range(1, 7)]
    for rows[2]["val_dice"] in (0.5, None, "", float("nan")):  # as text it is read again from metrics.csv
        save_progress("", rows)
    whole, *gaps = [[len(line.get_xdata()) for axes in figure.axes for line in axes.lines] for figure in drawn]
    assert whole == [6, 6, 1, *[6] * 5]  # loss, Dice, best, two gates, rate, K, clusters
    assert gaps == [[6, 5, 1, *[6] * 5]] * 3


@pytest.mark.parametrize("rows", [[], [{"epoch": 1}], [{"epoch": "1", "train_loss": "nan", "val_dice": "inf"}]])
def test_little_or_nothing_to_draw_is_no_error(tmp_path, rows):
    save_progress(tmp_path / "progress.png", rows)
    assert pixels(tmp_path / "progress.png").std() > 0
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


@pytest.fixture
def made(tmp_path, prepared):
    """Made-up slices and images: the folder of samples and that of lists."""
    lesions = write_set(tmp_path / "isic", [f"ISIC_{number:07d}" for number in range(20)], ending=".jpg", num_classes=2)
    return {"acdc": (prepared / "train_npz", prepared / "lists"), "isic": (lesions, lesions / "lists")}


def sheet_of(made, dataset, output, *more):
    root, lists = made[dataset]
    flags = ["--root_path", root, "--list_dir", lists, "--output", output, "--img_size", 32, *more]
    preview.main([dataset, *map(str, flags)])
    return pixels(output).astype(int)


@pytest.mark.parametrize("dataset", ["acdc", "isic"])
def test_a_preview_shows_every_class(made, tmp_path, dataset):
    sheet = sheet_of(made, dataset, tmp_path / "sheets" / f"{dataset}.png", "--count", 5)[:-70]  # without the legend
    for c, name in enumerate(DATASETS[dataset].class_names, 1):
        assert (np.abs(sheet - class_rgb(c)).max(-1) < 8).sum() > 5, name


def test_the_seed_decides_the_preview_and_wrong_flags_are_refused(made, tmp_path, refused):
    output = tmp_path / "sheet.png"
    flags = (), (), ("--seed", 3), ("--photometric",)
    plain, again, other, photometric = (sheet_of(made, "isic", output, "--count", 1, *more) for more in flags)
    np.testing.assert_array_equal(plain, again)
    assert not np.array_equal(plain, other) and not np.array_equal(plain, photometric)
    refused(lambda: sheet_of(made, "acdc", output, "--photometric"), "--photometric", "grey")
    refused(lambda: sheet_of(made, "isic", output, "--split", "val"), "val.txt")
