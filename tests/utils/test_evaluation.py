"""Prediction, scoring and the files that come of it, with a model that thresholds and volumes of boxes."""

import csv
import json
import logging
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from datasets.preprocessing import nifti_image
from utils.errors import RunError
from utils.evaluation import (
    case_dice,
    evaluate,
    format_table,
    mean_dice,
    predict_volume,
    read_case_csv,
    save_nifti,
    summarise,
    write_case_csv,
    write_summary_json,
)
from utils.metrics import case_metrics

NAMES = ("box", "core", "nowhere")


@dataclass
class BoxVolume:
    """A volume whose intensities are its class indices, resized by repeating and dropping voxels."""

    label: np.ndarray | None
    name: str = "case"
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    class_names: tuple[str, ...] = NAMES
    image: np.ndarray | None = None
    planar: bool = False

    def __post_init__(self):
        if self.image is None:
            self.image = self.label.astype(np.float32)

    def network_input(self, img_size: int, part: slice) -> np.ndarray:
        rows, columns = (np.arange(img_size) * n // img_size for n in self.image.shape[1:])
        return np.ascontiguousarray(self.image[part, None, rows][..., columns])

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(n) * prediction.shape[1] // n for n in self.image.shape[1:])
        return prediction[:, rows][..., columns]

    def to_nifti(self, array: np.ndarray):
        return nifti_image(array, self.affine, self.spacing, None)


class Threshold(nn.Module):
    """Gives the class nearest to the intensity; only the sum of its four maps says so, no single map does."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.9)
        self.num_classes = num_classes
        self.batch_sizes = []

    def forward(self, x):
        self.batch_sizes.append(len(x))
        x = self.dropout(self.norm(x))
        classes = torch.arange(self.num_classes).view(1, -1, 1, 1)
        logits = -((x - classes) ** 2)
        wrong = torch.zeros_like(logits)
        wrong[:, 2] = 100
        return [logits / 2 + wrong, logits / 2 - wrong, wrong, -wrong]


def box_label(depth: int = 5, height: int = 24, width: int = 32) -> np.ndarray:
    label = np.zeros((depth, height, width), np.uint8)
    label[1:4, 4:20, 6:26] = 1
    label[2:4, 8:16, 10:20] = 2
    return label


def with_image(label: np.ndarray, seen: np.ndarray, **fields) -> BoxVolume:
    """A volume for which the model predicts `seen`."""
    return BoxVolume(label, image=seen.astype(np.float32), **fields)


@pytest.fixture
def three_cases():
    """One perfect, one whose core is missed, one where a class is seen that is not there."""
    label = box_label()
    no_core, extra = np.minimum(label, 1), label.copy()
    extra[0, 0, 0:2] = 3
    return [
        with_image(label, label, name="perfect", spacing=(2.0, 1.0, 1.0)),
        with_image(label, no_core, name="missed", spacing=(2.0, 1.0, 1.0)),
        with_image(label, extra, name="spurious", spacing=(2.0, 1.0, 1.0)),
    ]


@pytest.fixture
def results(three_cases):
    return evaluate(Threshold(), three_cases, 4, img_size=96)


def test_the_prediction_is_the_arg_max_of_the_summed_maps_at_the_volumes_own_size():
    label = box_label()
    prediction = predict_volume(Threshold(), BoxVolume(label), img_size=96)
    assert prediction.dtype == np.uint8
    np.testing.assert_array_equal(prediction, label)


def test_the_batch_size_changes_the_batches_and_not_the_result():
    volume, sizes = BoxVolume(box_label()), {}
    for batch_size in (1, 2, 5, 100):
        model = Threshold()
        np.testing.assert_array_equal(predict_volume(model, volume, 48, batch_size), box_label())
        sizes[batch_size] = model.batch_sizes
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [5], 100: [5]}


def test_the_model_leaves_as_it_came():
    model = Threshold().train()
    model.norm.eval()  # a part that is held in evaluation mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict_volume(model, BoxVolume(box_label()), 48)
    assert model.training and model.dropout.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_gets_its_mode_back_when_it_fails():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        predict_volume(model, BoxVolume(box_label()), 48)
    assert model.training


def test_training_goes_on_after_a_prediction():
    model = Threshold().train()
    predict_volume(model, BoxVolume(box_label()), 48)
    sum(m.sum() for m in model(torch.rand(2, 1, 8, 8))).backward()
    assert torch.isfinite(model.norm.weight.grad).all()


def test_autocast_reaches_the_model():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            self.dtype = y.dtype
            return [y] * 4

    model = Conv()
    predict_volume(model, BoxVolume(box_label()), 32, amp_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    predict_volume(model, BoxVolume(box_label()), 32)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 24, 32), (3, 17, 40)])
def test_a_single_slice_and_an_empty_volume_are_no_error(shape):
    volume = BoxVolume(np.zeros(shape, np.uint8))
    results = evaluate(Threshold(), [volume], 4, img_size=32)
    assert [c.state for c in results[0].classes] == ["absent"] * 3
    summary = summarise(results)
    assert np.isnan(summary.strict.mean.dice)
    assert summary.transunet.mean.dice == 0
    assert "-" in format_table(summary, NAMES)


def test_states_and_means_of_both_conventions(results):
    summary = summarise(results)
    assert [[c.state for c in r.classes] for r in results] == [
        ["found", "found", "absent"],
        ["found", "missed", "absent"],
        ["found", "found", "spurious"],
    ]
    assert (summary.missed, summary.spurious, summary.absent) == ((0, 1, 0), (0, 0, 1), (0, 0, 2))
    label = box_label()
    box_with_core = 2 * (label == 1).sum() / ((label == 1).sum() + (label > 0).sum())
    box = (1 + box_with_core + 1) / 3
    np.testing.assert_allclose([c.dice for c in summary.transunet.classes], [box, 2 / 3, 1 / 3])
    np.testing.assert_allclose([c.dice for c in summary.strict.classes], [box, 2 / 3, 0])
    assert summary.strict.mean.dice == pytest.approx((box + 2 / 3) / 3)
    diagonal = np.sqrt(10**2 + 24**2 + 32**2)
    np.testing.assert_allclose([c.hd95 for c in summary.strict.classes[1:]], [diagonal / 3, diagonal])
    np.testing.assert_allclose([c.hd95 for c in summary.transunet.classes[1:]], [0, 0])


def test_a_class_that_is_never_there_is_left_out_of_the_strict_mean_only(three_cases):
    summary = summarise(evaluate(Threshold(), three_cases[:1], 4, img_size=96))
    assert np.isnan(summary.strict.classes[2].dice)
    assert summary.strict.mean == (1, 0, 1, 0)
    assert summary.transunet.mean.dice == pytest.approx(2 / 3)
    row = format_table(summary, NAMES).splitlines()[-2].split()
    assert row == ["nowhere", "-", "-", "-", "-", "0", "0", "1"]


def test_the_quick_dice_is_the_strict_dice_of_the_evaluation(three_cases, results):
    mean, per_class = mean_dice([case_dice(Threshold(), case, 4, img_size=96) for case in three_cases])
    summary = summarise(results)
    assert mean == pytest.approx(summary.strict.mean.dice)
    np.testing.assert_allclose(per_class, [c.dice for c in summary.strict.classes])


def test_units_follow_the_spacing():
    label = box_label()
    known, unknown = BoxVolume(label, spacing=(2.0, 1.0, 1.0)), BoxVolume(label)
    units = [summarise(evaluate(Threshold(), v, 4, 96)).strict.unit for v in ([known], [unknown], [known, unknown])]
    assert units == ["mm", "voxels", "mm or voxels"]


class FromDisk:
    """Boxes that exist only while somebody holds them."""

    def __init__(self):
        self.images, self.alive = [], []

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i >= 4:
            raise AssertionError("asked for a volume that is not there")
        self.alive.append(sum(image() is not None for image in self.images))
        volume = with_image(box_label(), box_label(), name=str(i))
        self.images.append(weakref.ref(volume.image))
        return volume


def test_one_volume_is_in_memory_at_a_time_or_two_where_pictures_are_drawn():
    volumes = FromDisk()
    assert len(evaluate(Threshold(), volumes, 4, 96)) == 4
    assert volumes.alive == [0, 0, 0, 0]
    volumes, drawn = FromDisk(), []
    evaluate(Threshold(), volumes, 4, 96, on_case=lambda volume, prediction: drawn.append(volume.name))
    assert max(volumes.alive) <= 2
    assert drawn == ["0", "1", "2", "3"]


def test_a_volume_is_scored_while_the_next_is_predicted(three_cases):
    """The first case's scoring waits for the second's prediction: in one thread this would never end."""
    second_is_predicted = threading.Event()

    class Signals(Threshold):
        def forward(self, x):
            if len(self.batch_sizes) == 1:
                second_is_predicted.set()
            return super().forward(x)

    def wait(volume, prediction):
        assert volume.name != "perfect" or second_is_predicted.wait(timeout=60)

    results = evaluate(Signals(), three_cases, 4, 96, on_case=wait)
    assert [result.name for result in results] == ["perfect", "missed", "spurious"]


def test_what_goes_wrong_while_a_case_is_saved_is_raised(three_cases):
    def full(volume, prediction):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        evaluate(Threshold(), three_cases, 4, 96, on_case=full)


def test_a_line_in_the_log_for_each_case(three_cases, caplog):
    with caplog.at_level(logging.INFO):
        evaluate(Threshold(), three_cases, 4, 96)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["1/3 perfect", "2/3 missed", "3/3 spurious"]
    assert "mm" in caplog.text


def test_no_volume_and_no_label_are_one_line_errors():
    unlabelled = BoxVolume(None, image=np.zeros((2, 8, 8), np.float32), name="case7")
    with pytest.raises(RunError, match="no volume"):
        evaluate(Threshold(), [], 4, 32)
    with pytest.raises(RunError, match="no volume"):
        mean_dice([])
    with pytest.raises(RunError, match=r"case7.*no label"):
        evaluate(Threshold(), [unlabelled], 4, 32)
    with pytest.raises(RunError, match=r"case7.*no label"):
        case_dice(Threshold(), unlabelled, 4, 32)


def test_the_table_is_aligned_and_labelled(results):
    table = format_table(summarise(results), NAMES)
    transunet, strict = table.split("\n\n")
    assert transunet.startswith("transunet convention, 3 cases") and strict.startswith("strict convention, 3 cases")
    assert "HD95 [voxels]" in transunet and "HD95 [mm]" in strict
    for block in (transunet, strict):
        lines = block.splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["class", *NAMES, "mean"]
        assert len({len(line) for line in lines}) == 1
    assert strict.splitlines()[3].split() == ["core", "66.67", "13.74", "66.67", "13.74", "1", "0", "0"]


def test_every_table_says_that_a_checkpoint_was_chosen_on_the_test_volumes(results, tmp_path):
    assert "test volumes" not in format_table(summarise(results), NAMES)
    assert "test volumes" in format_table(summarise(results), NAMES, "test").splitlines()[0]
    for chosen in ("val", "test"):
        write_summary_json(tmp_path / "summary.json", summarise(results), NAMES, chosen)
        assert json.loads((tmp_path / "summary.json").read_text())["selected_on"] == chosen
        write_case_csv(tmp_path / "cases.csv", results, NAMES, chosen)
        with open(tmp_path / "cases.csv", newline="") as file:
            assert {row["selected_on"] for row in csv.DictReader(file)} == {chosen}


def test_a_wrong_number_of_class_names_is_refused(results, tmp_path):
    with pytest.raises(RunError, match=r"2 class names .* for 3 classes"):
        format_table(summarise(results), NAMES[:2])
    with pytest.raises(RunError, match="2 class names"):
        write_case_csv(tmp_path / "cases.csv", results, NAMES[:2])
    assert list(tmp_path.iterdir()) == []


def test_the_csv_has_every_case_and_class_under_both_conventions(results, tmp_path):
    write_case_csv(tmp_path / "new" / "cases.csv", results, NAMES)
    with open(tmp_path / "new" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["class"]) for r in rows] == [(c.name, n) for c in results for n in NAMES]
    missed, absent = rows[4], rows[5]
    assert (missed["state"], missed["transunet_hd95"], missed["strict_unit"]) == ("missed", "0.000000", "mm")
    assert float(missed["strict_hd95"]) == pytest.approx(np.sqrt(1700), abs=1e-6)
    assert (absent["transunet_dice"], absent["strict_dice"]) == ("0.000000", "")
    for row, c in zip(rows, (c for r in results for c in r.classes), strict=True):
        assert float(row["transunet_jaccard"]) == pytest.approx(c.transunet.jaccard, abs=1e-6)
        assert float(row["transunet_assd"]) == pytest.approx(c.transunet.assd, abs=1e-6)


def test_the_csv_is_read_back_as_it_was_written(results, tmp_path):
    write_case_csv(tmp_path / "cases.csv", results, NAMES, "test")
    read, names, selected_on = read_case_csv(tmp_path / "cases.csv")
    assert (names, selected_on) == (list(NAMES), "test")
    assert [(case.name, case.unit) for case in read] == [(case.name, case.unit) for case in results]
    for ours, theirs in zip((c for r in read for c in r.classes), (c for r in results for c in r.classes), strict=True):
        assert ours.state == theirs.state
        np.testing.assert_allclose((ours.transunet, ours.strict), (theirs.transunet, theirs.strict), atol=1e-6)


def test_the_json_holds_the_summary_and_null_for_what_is_left_out(three_cases, tmp_path):
    summary = summarise(evaluate(Threshold(), three_cases[:2], 4, 96))
    write_summary_json(tmp_path / "summary.json", summary, NAMES)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert content["num_cases"] == 2
    assert content["strict"]["unit"] == "mm" and content["transunet"]["unit"] == "voxels"
    assert content["strict"]["classes"][2] == {"class": "nowhere", **dict.fromkeys(summary.strict.mean._fields)}
    assert content["transunet"]["mean"] == pytest.approx(summary.transunet.mean._asdict())
    assert content["missed"] == [{"class": n, "cases": c} for n, c in zip(NAMES, (0, 1, 0), strict=True)]


@pytest.fixture
def lopsided():
    """No two axes alike: a voxel (z, y, x) = (1, 2, 5) of class 2 in a volume of 3 x 7 x 11."""
    label = np.zeros((3, 7, 11), np.uint8)
    label[1, 2, 5] = 2
    image = np.arange(label.size, dtype=np.float32).reshape(label.shape)
    return BoxVolume(label, image=image, name="patient001_frame01", spacing=(8.0, 1.5, 1.25))


def test_nifti_lays_a_voxel_where_the_affine_says(lopsided, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    turned = np.array([[0, -1.5, 0, 30.0], [1.25, 0, 0, -20.0], [0, 0, 8.0, 5.0], [0, 0, 0, 1.0]])
    lopsided.affine = turned
    paths = save_nifti(tmp_path, lopsided.label, lopsided)
    assert {p.name for p in paths} == {f"patient001_frame01_{kind}.nii.gz" for kind in ("pred", "gt", "img")}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    for kind in ("pred", "gt"):
        nifti = nibabel.load(tmp_path / f"patient001_frame01_{kind}.nii.gz")
        assert nifti.shape == (11, 7, 3) and nifti.get_data_dtype() == np.uint8
        (index,) = np.argwhere(np.asarray(nifti.dataobj) == 2)
        world = nibabel.affines.apply_affine(nifti.affine, index)
        np.testing.assert_allclose(world, [30 - 1.5 * 2, -20 + 1.25 * 5, 5 + 8 * 1])
    image = nibabel.load(tmp_path / "patient001_frame01_img.nii.gz")
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata().transpose(2, 1, 0), lopsided.image)


@pytest.mark.parametrize(("spacing", "zooms"), [((8.0, 1.5, 1.25), (1.25, 1.5, 8.0)), (None, (1.0, 1.0, 1.0))])
def test_nifti_without_an_affine_has_the_spacing(lopsided, tmp_path, spacing, zooms):
    nibabel = pytest.importorskip("nibabel")
    lopsided.spacing = spacing
    lopsided.label, prediction = None, lopsided.label
    (path, _) = save_nifti(tmp_path, prediction, lopsided)
    nifti = nibabel.load(path)
    assert nifti.header.get_zooms() == zooms
    np.testing.assert_allclose(nifti.affine, np.diag([*zooms, 1]))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "..", "a/../../b", "..\\outside"])
def test_a_name_never_leads_out_of_the_folder(lopsided, tmp_path, name):
    pytest.importorskip("nibabel")
    lopsided.name = name
    folder = tmp_path / "in" / "here"
    paths = save_nifti(folder, lopsided.label, lopsided)
    assert {p.resolve() for p in tmp_path.rglob("*.nii.gz")} == {p.resolve() for p in paths}
    assert {p.resolve().parent for p in paths} == {folder.resolve()}
    assert not any(p.name.startswith(".") for p in paths)


@dataclass
class BoxPicture(BoxVolume):
    """The same as an image: one slice, measured in two dimensions."""

    planar: bool = True


def test_images_are_measured_in_two_dimensions_and_pooled(tmp_path):
    first = box_label(1)
    first[0, 4:20, 6:26] = 1
    second = np.zeros_like(first)
    second[0, :10, :10] = 1
    seen = np.roll(first, 2, axis=2)
    pictures = [
        BoxPicture(first, image=seen.astype(np.float32), name="a"),
        BoxPicture(second, image=second.astype(np.float32), name="b"),
    ]
    results = evaluate(Threshold(), pictures, 4, 96)
    assert results[0].classes == case_metrics(seen[0], first[0], 4)
    assert results[0].classes[0].transunet.hd95 < 3  # in three dimensions every pixel would be at the border
    summary = summarise(results)
    assert summary.transunet.unit == summary.strict.unit == "pixels"
    both, one = 16 * 18, 16 * 20
    assert summary.pooled[0].dice == pytest.approx(2 * (both + 100) / (2 * (one + 100)))
    jaccard = both / (2 * one - both)
    assert summary.thresholded[0] == pytest.approx((jaccard + 1) / 2)
    table = format_table(summary, NAMES)
    assert "HD95 [pixels]" in table and "Jaccard, 0 below 0.65 [%]" in table
    assert "over the pixels of all cases together" in table and "Sensitivity [%]" in table
    write_summary_json(tmp_path / "summary.json", summary, NAMES)
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["pooled"][0]["dice"] == pytest.approx(summary.pooled[0].dice)
    assert content["thresholded_jaccard"][2] == {"class": "nowhere", "mean": None}
