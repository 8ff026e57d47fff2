"""Dice, HD95, Jaccard and ASSD against paper, medpy and the fixture, and both conventions on empty masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from medpy.metric import binary

from tests.parity import load
from utils.metrics import case_metrics, class_metrics, confusion, dice_only, pooled_metrics


def test_every_value_of_the_fixture():
    f = load("metrics.npz")
    shape, count = f["shape"], int(np.prod(f["shape"]))
    prediction, label = (np.unpackbits(f[k], count=count).reshape(shape).astype(bool) for k in ("prediction", "label"))
    ours = [class_metrics(p, q).transunet for p, q in zip(prediction, label, strict=True)]
    np.testing.assert_allclose(ours, f["dice_hd95_jaccard_assd"], rtol=0, atol=1e-6)


def medpy(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return Dice, HD95, Jaccard and ASSD as medpy computes them."""
    return binary.dc(a, b), binary.hd95(a, b, spacing), binary.jc(a, b), binary.assd(a, b, spacing)


@st.composite
def mask_pairs(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7))
    masks = []
    for _ in range(2):
        mask = draw(arrays(bool, shape))
        mask.flat[draw(st.integers(0, mask.size - 1))] = True
        masks.append(mask)
    return *masks, draw(st.none() | st.tuples(*[st.floats(0.1, 10)] * len(shape)))


@settings(max_examples=150, deadline=None)
@given(mask_pairs())
def test_equals_medpy_on_masks_that_have_voxels(pair):
    a, b, spacing = pair
    result = class_metrics(a, b, spacing)
    np.testing.assert_allclose(result.transunet, medpy(a, b, None), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.strict, medpy(a, b, spacing), rtol=1e-9, atol=1e-9)


def test_masks_of_any_number_type_are_compared_and_indices_beyond_the_classes_refused(refused):
    a, b = np.zeros((2, 3, 8, 9), bool)
    a[1, 2:6, 2:7], b[1:, 3:6, 1:6] = True, True
    for dtype in (np.uint8, np.int16, np.int64, np.float32):
        assert class_metrics(a.astype(dtype), 255 * b.astype(dtype), (5, 1, 1)) == class_metrics(a, b, (5, 1, 1))
    refused(lambda: dice_only(np.full((1, 2, 2), 3), np.ones((1, 2, 2), int), 3), "from 1 to 3", "0 to 2")


def test_classes_of_a_volume_equal_medpy_up_to_its_rim():
    spacing = (8.0, 1.5, 1.25)
    prediction, label = np.zeros((2, 9, 40, 30), np.uint8)
    prediction[:, :20, :] = 1
    label[3:, 5:, 10:] = 1
    prediction[2:4, 3:9, 4:8], label[1:4, 4:9, 4:9] = 2, 2
    prediction[8, 39, 29] = label[0, 0, 0] = 2
    for c, result in enumerate(case_metrics(prediction, label, 3, spacing), 1):
        np.testing.assert_allclose(result.strict, medpy(prediction == c, label == c, spacing), rtol=1e-9)


@pytest.mark.parametrize(("spacing", "mm"), [((1.0, 1.0, 1.0), 5.0), ((10.0, 1.5, 1.5), 50.0), ((0.5, 3.0, 3.0), 2.5)])
def test_two_voxels_are_as_far_apart_as_the_spacing_says(spacing, mm):
    a, b = np.zeros((2, 8, 4, 4), bool)
    a[1, 2, 2] = b[6, 2, 2] = True
    result = class_metrics(a, b, spacing)
    assert result.transunet == (0, 5, 0, 5)
    assert result.strict == (0, mm, 0, mm)


EMPTY, FULL = np.zeros((3, 4, 12), bool), np.pad(np.ones((1, 1, 2), bool), ((1, 1), (1, 2), (5, 5)))


@pytest.mark.parametrize(
    ("prediction", "label", "state", "transunet", "strict"),
    [
        (FULL, EMPTY, "spurious", (1, 0, 1, 0), (0, 13, 0, 13)),
        (EMPTY, FULL, "missed", (0, 0, 0, 0), (0, 13, 0, 13)),
        (EMPTY, EMPTY, "absent", (0, 0, 0, 0), (np.nan,) * 4),
    ],
)
def test_empty_masks_count_as_each_convention_says(prediction, label, state, transunet, strict):
    result = class_metrics(prediction, label)  # a volume of 3 x 4 x 12 voxels has a diagonal of 13
    assert result.state == state
    np.testing.assert_equal(result.transunet, transunet)
    np.testing.assert_equal(result.strict, strict)
    in_mm = class_metrics(prediction, label, (2.0, 2.0, 2.0)).strict
    np.testing.assert_allclose(in_mm, np.multiply(strict, (1, 2, 1, 2)))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_dice_only_is_the_strict_dice(data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=3, max_side=6))
    prediction, label = (data.draw(arrays(np.uint8, shape, elements=st.integers(0, 4))) for _ in range(2))
    expected = [c.strict.dice for c in case_metrics(prediction, label, 5)]
    np.testing.assert_allclose(dice_only(prediction, label, 5), expected, rtol=1e-12)


def test_impossible_spacings_and_masks_of_different_shape_are_refused(refused):
    for spacing in ((1.0, 1.0), (0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, np.nan)):
        refused(lambda spacing=spacing: class_metrics(FULL, FULL, spacing), "3 positive numbers")
    refused(lambda: class_metrics(FULL, FULL[:, :, 1:]), "shape")
    refused(lambda: dice_only(FULL, FULL[:, :, 1:], 2), "shape")


@settings(max_examples=50, deadline=None)
@given(st.lists(mask_pairs(), min_size=1, max_size=4))
def test_pooled_scores_are_those_of_all_pixels_laid_side_by_side(pairs):
    counts = sum(confusion(p.astype(np.uint8), q.astype(np.uint8), 2) for p, q, _ in pairs)
    pooled = {name: score.item() for name, score in pooled_metrics(counts).items()}
    p, q = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    expected = {
        "dice": 2 * (p & q).sum() / (p.sum() + q.sum()),
        "jaccard": (p & q).sum() / (p | q).sum(),
        "sensitivity": p[q].mean(),
        "specificity": np.nan if q.all() else 1 - p[~q].mean(),
        "accuracy": (p == q).mean(),
    }
    assert pooled == pytest.approx(expected, nan_ok=True)
