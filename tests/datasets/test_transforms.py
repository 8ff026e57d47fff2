"""Resizing is scipy's, only faster; augmentation moves image and label alike, as often and as far as specified."""

import sys

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from datasets import photometric
from datasets.transforms import augment, resize_cubic, resize_nearest

SIZES = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 2**16))
def test_resizing_equals_scipy(height, width, new_height, new_width, seed):
    zoom = (new_height / height, new_width / width)
    rng = np.random.default_rng(seed)
    image, label = rng.random((height, width)), rng.integers(0, 5, (height, width), dtype=np.uint8)
    with torch.autocast("cpu", torch.bfloat16):  # which must change nothing
        cubic, nearest = resize_cubic(image, (new_height, new_width)), resize_nearest(label, (new_height, new_width))
    assert (cubic.dtype, nearest.dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(cubic, ndimage.zoom(image, zoom, order=3, mode="mirror"), atol=1e-5)
    np.testing.assert_array_equal(nearest, ndimage.zoom(label, zoom, order=0, mode="nearest"))


def test_stacks_are_resized_map_by_map_and_a_result_can_be_changed():
    stack = np.random.default_rng(0).random((2, 3, 17, 31), np.float32)
    for resize in (resize_cubic, resize_nearest):
        each = [[resize(plane, (24, 19)) for plane in part] for part in stack]
        np.testing.assert_allclose(resize(stack, (24, 19)), each, atol=1e-6)
        resize(stack, (17, 31))[:] = 0  # of the same size
        assert stack.any()


def test_image_and_label_move_together_in_each_way_as_often_as_specified():
    original = np.arange(1, 20 * 14 + 1, dtype=np.float32).reshape(20, 14)
    original_label, contents = (original % 251).astype(np.uint8), []
    for seed in range(800):
        image, label = augment(original, original_label, np.random.default_rng(seed))
        np.testing.assert_array_equal(original.ravel(), np.arange(1, 281))  # left as it was
        inside = image > 0
        np.testing.assert_array_equal(label[inside], image[inside] % 251)
        assert not label[~inside].any()
        contents.append(image.tobytes())
    turned = {(np.flip(np.rot90(original, k), axis)).tobytes() for k in range(4) for axis in range(2)}
    turned -= {original.tobytes()}
    rotated = {ndimage.rotate(original, angle, order=0, reshape=False).tobytes() for angle in range(-20, 20) if angle}
    assert set(contents) <= turned | rotated | {original.tobytes()}
    # Four standard deviations of a share of 800; an angle of 0 leaves the rotated ones at 0.25 * 39 / 40.
    assert abs(np.mean([content in turned for content in contents]) - 0.5) < 0.07
    assert abs(np.mean([content in rotated for content in contents]) - 0.244) < 0.06


def bands(height=120, width=90):
    """Return an image whose red is 20 + 100 * label, and the label: wavy bands, one at every border."""
    y, x = np.mgrid[:height, :width]
    label = ((y + 6 * np.sin(x / 9)) // 15 % 3).astype(np.uint8)
    return np.stack([20 + 100 * label, np.full_like(label, 90), np.full_like(label, 60)], -1), label


def test_photometric_augmentation_bends_image_and_label_alike_up_to_the_border(monkeypatch):
    for name, value in dict(BRIGHTNESS=0, CONTRAST=0, SATURATION=0, HUE=0, BLUR=0, ELASTIC=6.0, SHARE=1).items():
        monkeypatch.setattr(photometric, name, value)
    image, label = bands()
    moved = 0
    for seed in range(10):
        bent, bent_label = photometric.photometric(image, label, np.random.default_rng(seed))
        assert (bent.shape, bent.dtype, bent_label.shape, bent_label.dtype) == (image.shape, "u1", label.shape, "u1")
        assert set(np.unique(bent_label)) <= {0, 1, 2}
        # Between two bands the image is interpolated and the label is not.
        band = (bent[..., 0].astype(float) - 20) / 100
        wrong = (np.abs(band - band.round()) < 0.02) & (band.round() != bent_label)
        # What lies between bands 0 and 2 passes through 1.
        assert wrong.mean() < 0.01
        assert wrong[[0, -1]].mean() < 0.05 and wrong[:, [0, -1]].mean() < 0.05
        moved += (bent_label != label).mean()
    assert moved / 10 > 0.03


def test_a_missing_library_is_one_line(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "imgaug", None)
    refused(lambda: photometric.photometric(*bands(), np.random.default_rng(0)), "imgaug", "requirements.txt")
