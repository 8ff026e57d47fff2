"""Prediction, scoring and NIfTI files, with a model that thresholds and volumes of boxes."""

import copy
import logging
import threading
import weakref
from contextlib import nullcontext
from unittest import mock

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from datasets import Volume
from utils.evaluation import evaluate, mean_dice, predict_volume, save_nifti
from utils.metrics import case_metrics
from utils.results import case_table, summarise

NAMES = ("box", "core", "nowhere")


class BoxVolume(Volume):
    """A volume whose intensities are class indices, resized by repeating and dropping voxels."""

    def network_input(self, img_size: int, part: slice) -> np.ndarray:
        rows, columns = (np.arange(img_size) * n // img_size for n in self.image.shape[1:])
        return np.ascontiguousarray(self.image[part, None, rows][..., columns])

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(n) * prediction.shape[1] // n for n in self.image.shape[1:])
        return prediction[:, rows][..., columns]


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


def box_label(depth: int = 5) -> np.ndarray:
    label = np.zeros((depth, 24, 32), np.uint8)
    label[1:4, 4:20, 6:26] = 1
    label[2:4, 8:16, 10:20] = 2
    return label


def volume_of(label: np.ndarray, seen: np.ndarray | None = None, name: str = "case", **fields) -> BoxVolume:
    """Return a volume for which the model predicts `seen`, or its label."""
    return BoxVolume(name, (label if seen is None else seen).astype(np.float32), label, **fields)


def predictions() -> dict[str, np.ndarray]:
    """Return a perfect prediction of the boxes, one that misses the core, and one with a class that is not there."""
    label = box_label()
    extra = label.copy()
    extra[0, 0, 0:2] = 3
    return {"perfect": label, "missed": np.minimum(label, 1), "spurious": extra}


@pytest.fixture
def three_cases():
    return [volume_of(box_label(), seen, name, spacing=(2.0, 1.0, 1.0)) for name, seen in predictions().items()]


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (100, [5])])
def test_the_prediction_is_the_arg_max_of_the_summed_maps_for_any_batch_size(batch_size, batches):
    model = Threshold()
    prediction = predict_volume(model, volume_of(box_label()), 96, batch_size)
    assert prediction.dtype == np.uint8 and model.batch_sizes == batches
    np.testing.assert_array_equal(prediction, box_label())


def test_the_model_is_unchanged_and_can_train_afterwards():
    model = Threshold().train()
    model.norm.eval()  # a part that is held in evaluation mode
    before = copy.deepcopy(model.state_dict())
    for model.num_classes, outcome in ((4, nullcontext()), (None, pytest.raises(TypeError))):
        with outcome:
            predict_volume(model, volume_of(box_label()), 48)
        assert model.training and model.dropout.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.num_classes = 4
    sum(m.sum() for m in model.train()(torch.rand(2, 1, 8, 8))).backward()
    assert torch.isfinite(model.norm.weight.grad).all()


def test_autocast_reaches_the_model():
    model, types = nn.Conv2d(1, 2, 1), []
    model.register_forward_hook(lambda _, arguments, output: types.append(output.dtype) or [output])
    for amp_dtype in (torch.bfloat16, None):
        predict_volume(model, volume_of(box_label(1)), 32, amp_dtype=amp_dtype)
    assert types == [torch.bfloat16, torch.float32]


def test_a_single_slice_without_any_class_is_no_error():
    results = evaluate(Threshold(), [volume_of(np.zeros((1, 24, 32), np.uint8))], 4, img_size=32)
    assert [c.state for c in results[0].classes] == ["absent"] * 3
    summary = summarise(case_table(results, NAMES))
    assert summary["strict"]["mean"]["dice"] is None and summary["transunet"]["mean"]["dice"] == 0


def test_cases_are_scored_in_order_with_a_line_in_the_log_for_each(three_cases, caplog):
    with caplog.at_level(logging.INFO):
        results = evaluate(Threshold(), [*three_cases, volume_of(box_label(), name="no spacing")], 4, img_size=96)
    lines = [record.getMessage().split(":")[0] for record in caplog.records]
    assert lines == ["1/4 perfect", "2/4 missed", "3/4 spurious", "4/4 no spacing"]
    assert [(r.name, r.unit, [c.state for c in r.classes]) for r in results] == [
        ("perfect", "mm", ["found", "found", "absent"]),
        ("missed", "mm", ["found", "missed", "absent"]),
        ("spurious", "mm", ["found", "found", "spurious"]),
        ("no spacing", "voxels", ["found", "found", "absent"]),
    ]


def test_the_mean_dice_leaves_out_what_no_case_has():
    mean, per_class = mean_dice([np.array([np.nan, 0.5, np.nan]), np.array([np.nan, 1, 0])])
    np.testing.assert_array_equal([mean, *per_class], [0.375, np.nan, 0.75, 0])


def test_a_volume_is_scored_while_the_next_is_predicted_and_two_are_in_memory():
    """The first case's scoring waits for the second's prediction: in one thread this would never end."""
    images, alive, drawn, second_is_predicted = [], [], [], threading.Event()

    class Signals(Threshold):
        def forward(self, x):
            if len(self.batch_sizes) == 1:
                second_is_predicted.set()
            return super().forward(x)

    def draw(volume, prediction):
        assert volume.name != "0" or second_is_predicted.wait(timeout=60)
        drawn.append(volume.name)

    class FromDisk:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            assert i < 4
            alive.append(sum(image() is not None for image in images))
            volume = volume_of(box_label(), name=str(i))
            images.append(weakref.ref(volume.image))
            return volume

    evaluate(Signals(), FromDisk(), 4, img_size=96, on_case=draw)
    assert max(alive) <= 1  # beside the one that is opened
    assert drawn == ["0", "1", "2", "3"]
    with pytest.raises(OSError, match="No space"):
        evaluate(Threshold(), FromDisk(), 4, mock.Mock(side_effect=OSError("No space left")), img_size=96)


def test_images_are_measured_in_two_dimensions():
    label = box_label(1)
    label[0, 4:20, 6:26] = 1
    seen = np.roll(label, 2, axis=2)
    picture = volume_of(label, seen)
    picture.planar = True
    (result,) = evaluate(Threshold(), [picture], 4, img_size=96)
    assert result.unit == "pixels" and result.classes == case_metrics(seen[0], label[0], 4)
    assert result.classes[0].transunet.hd95 < 3  # in three dimensions every pixel would be at the border
    assert result.confusion[1, 1] == 16 * 18 and result.confusion.sum() == label.size


@pytest.fixture
def lopsided():
    """No two axes alike: a voxel (z, y, x) = (1, 2, 5) of class 2 in a volume of 3 x 7 x 11."""
    label = np.zeros((3, 7, 11), np.uint8)
    label[1, 2, 5] = 2
    image = np.arange(label.size, dtype=np.float32).reshape(label.shape)
    return BoxVolume("patient001_frame01", image, label, spacing=(8.0, 1.5, 1.25))


def test_nifti_lays_a_voxel_where_the_affine_says(lopsided, tmp_path):
    lopsided.affine = np.array([[0, -1.5, 0, 30.0], [1.25, 0, 0, -20.0], [0, 0, 8.0, 5.0], [0, 0, 0, 1.0]])
    paths = save_nifti(tmp_path, lopsided.label, lopsided)
    names = [f"patient001_frame01_{kind}.nii.gz" for kind in ("pred", "gt", "img")]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths} == set(names)
    for name in names[:2]:
        nifti = nibabel.load(tmp_path / name)
        assert nifti.shape == (11, 7, 3) and nifti.get_data_dtype() == np.uint8
        (index,) = np.argwhere(np.asarray(nifti.dataobj) == 2)
        world = nibabel.affines.apply_affine(nifti.affine, index)
        np.testing.assert_allclose(world, [30 - 1.5 * 2, -20 + 1.25 * 5, 5 + 8 * 1])
    image = nibabel.load(tmp_path / names[2])
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata().transpose(2, 1, 0), lopsided.image)


def test_nifti_without_an_affine_has_the_spacing(lopsided, tmp_path):
    lopsided.label, prediction = None, lopsided.label
    for lopsided.spacing, zooms in (((8.0, 1.5, 1.25), (1.25, 1.5, 8.0)), (None, (1.0, 1.0, 1.0))):
        nifti = nibabel.load(save_nifti(tmp_path, prediction, lopsided)[0])
        np.testing.assert_allclose(nifti.affine, np.diag([*zooms, 1]))
    assert len(list(tmp_path.iterdir())) == 2
