"""Prediction, scoring and NIfTI files, with a model that thresholds and volumes of boxes."""

import weakref
from functools import partial
from unittest import mock

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from datasets import Volume
from utils.evaluation import evaluate, mean_dice, predict_case, save_nifti
from utils.metrics import case_metrics

NAMES = ("box", "core", "nowhere")


class Threshold(nn.Module):
    """Gives the class nearest to the intensity; only the sum of its four maps says so, no single map does.

    brightest: the intensity of the last class; None: each class is as bright as its number.
    """

    def __init__(self, num_classes: int = 4, brightest: float | None = None):
        super().__init__()
        self.config = {"num_classes": num_classes, "in_channels": 1, "img_size": 32}
        self.scale = 1 if brightest is None else (num_classes - 1) / brightest
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(0.9)
        self.num_classes = num_classes
        self.batch_sizes = []

    def forward(self, x):
        self.batch_sizes.append(len(x))
        x = self.scale * self.dropout(self.norm(x))
        logits = -((x - torch.arange(self.num_classes).view(1, -1, 1, 1)) ** 2)
        wrong = torch.zeros_like(logits)
        wrong[:, 2] = 100
        return [logits / 2 + wrong, logits / 2 - wrong, wrong, -wrong]


def box_label(depth: int = 5) -> np.ndarray:
    label = np.zeros((depth, 32, 32), np.uint8)
    label[1:4, 4:20, 6:26] = 1
    label[2:4, 8:16, 10:20] = 2
    return label


def volume_of(label: np.ndarray, seen: np.ndarray | None = None, name: str = "case", **fields) -> Volume:
    """Return a volume for which the model predicts `seen`, or its label."""
    return Volume(name, (label if seen is None else seen).astype(np.float32), label, **fields)


PREDICT = partial(predict_case, Threshold(), img_size=32)


def predictions() -> dict[str, np.ndarray]:
    """Return a perfect prediction of the boxes, one that misses the core, and one with a class that is not there."""
    label = box_label()
    extra = label.copy()
    extra[0, 0, 0:2] = 3
    return {"perfect": label, "missed": np.minimum(label, 1), "spurious": extra}


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (100, [5])])
def test_the_prediction_is_the_arg_max_of_the_summed_maps_for_any_batch_size(batch_size, batches):
    model = Threshold()
    prediction = predict_case(model, volume_of(box_label()), 32, batch_size)
    assert prediction.dtype == np.uint8 and model.batch_sizes == batches
    model.config = {"variant": "release"}  # whose authors predict one slice at a time
    predict_case(model, volume_of(box_label()), 32, batch_size)
    assert model.batch_sizes == [*batches, *[1] * 5]
    np.testing.assert_array_equal(prediction, box_label())


def test_autocast_reaches_the_model():
    model, types = nn.Conv2d(1, 2, 1), []
    model.register_forward_hook(lambda _, arguments, output: types.append(output.dtype) or [output])
    for amp_dtype in (torch.bfloat16, None):
        predict_case(model, volume_of(box_label(1)), 32, amp_dtype=amp_dtype)
    assert types == [torch.bfloat16, torch.float32]


def test_an_output_that_is_not_finite_is_no_prediction(refused):
    model = nn.Conv2d(1, 2, 1)
    nn.init.constant_(model.weight, 3e38)
    model.register_forward_hook(lambda _, arguments, output: [output, -output])  # inf and -inf
    predict = partial(predict_case, model, volume_of(box_label(), name="a"), 32)
    refused(predict, "a: the network's output is not finite", "lower --base_lr")
    refused(lambda: predict(amp_dtype=torch.bfloat16), "a: the network's output is not finite", "--amp none")


def test_cases_are_scored_in_order_with_a_line_in_the_log_for_each(caplog):
    cases = [volume_of(box_label(), seen, name, spacing=(2.0, 1.0, 1.0)) for name, seen in predictions().items()]
    caplog.set_level("INFO")
    results = evaluate(PREDICT, [*cases, volume_of(box_label(), name="no spacing")], 4)
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


def test_two_volumes_are_in_memory_and_what_draws_a_case_may_fail():
    images, alive = [], []

    class FromDisk(list):
        def __getitem__(self, i):
            assert i < 4
            alive.append(sum(image() is not None for image in images))
            volume = volume_of(box_label(), name=str(i))
            images.append(weakref.ref(volume.image))
            return volume

    evaluate(PREDICT, FromDisk(range(4)), 4)
    assert max(alive) <= 1  # beside the one that is opened
    with pytest.raises(OSError, match="No space"):
        evaluate(PREDICT, FromDisk(range(4)), 4, mock.Mock(side_effect=OSError("No space left")))


def test_images_are_measured_in_two_dimensions():
    label = box_label(1)
    label[0, 4:20, 6:26] = 1
    seen = np.roll(label, 2, axis=2)
    picture = volume_of(label, seen)
    picture.planar = True
    (result,) = evaluate(PREDICT, [picture], 4)
    assert result.unit == "pixels" and result.classes == case_metrics(seen[0], label[0], 4)
    assert result.classes[0].transunet.hd95 < 3  # in three dimensions every pixel would be at the border
    assert result.confusion[1, 1] == 16 * 18 and result.confusion.sum() == label.size


def test_nifti_without_an_affine_has_the_spacing(tmp_path):
    """With one, tests/datasets/test_scan.py looks where every voxel lies."""
    label = np.random.default_rng(0).integers(0, 3, (3, 7, 11), np.uint8)
    volume = volume_of(label)
    for volume.spacing, zooms in (((8.0, 1.5, 1.25), (1.25, 1.5, 8.0)), (None, (1.0, 1.0, 1.0))):
        paths = save_nifti(tmp_path, label, volume)
        assert [path.name for path in paths] == ["case_pred.nii.gz", "case_img.nii.gz", "case_gt.nii.gz"]
        for path, dtype in zip(paths, (np.uint8, np.float32, np.uint8), strict=True):
            file = nibabel.load(path)
            np.testing.assert_allclose(file.affine, np.diag([*zooms, 1]))
            np.testing.assert_array_equal(np.asarray(file.dataobj), label.T)
            assert file.get_data_dtype() == dtype
    volume.label = None
    assert len(save_nifti(tmp_path, label, volume)) == 2
