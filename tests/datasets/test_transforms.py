"""Resizing is scipy's, only faster; augmentation moves image and label alike, as often and as far as specified."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from datasets.transforms import augment, resize_cubic, resize_nearest

SIZES = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 2**16))
def test_resizing_equals_scipy(height, width, new_height, new_width, seed):
    zoom = (new_height / height, new_width / width)
    rng = np.random.default_rng(seed)
    image, label = rng.random((height, width)), rng.integers(0, 5, (height, width), dtype=np.uint8)
    cubic, nearest = resize_cubic(image, (new_height, new_width)), resize_nearest(label, (new_height, new_width))
    assert (cubic.dtype, nearest.dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(cubic, ndimage.zoom(image, zoom, order=3, mode="mirror"), atol=1e-5)
    np.testing.assert_array_equal(nearest, ndimage.zoom(label, zoom, order=0, mode="nearest"))


def test_stacks_are_resized_map_by_map():
    stack = np.random.default_rng(0).random((2, 3, 17, 31))
    for resize in (resize_cubic, resize_nearest):
        each = [[resize(plane, (24, 19)) for plane in part] for part in stack]
        np.testing.assert_allclose(resize(stack, (24, 19)), each, atol=1e-6)


def test_a_result_can_be_changed_and_autocast_changes_nothing():
    image = np.random.default_rng(0).random((9, 9)).astype(np.float32)
    for size in ((9, 9), (12, 12)):
        first = resize_cubic(image, size)
        again = first.copy()
        first[:] = 0
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(resize_cubic(image, size), again)
    assert image.any()


def _samples(count):
    image = np.arange(1, 20 * 14 + 1, dtype=np.float32).reshape(20, 14)
    label = (image % 251).astype(np.uint8)
    for seed in range(count):
        yield image, label, *augment(image, label, np.random.default_rng(seed))


def test_image_and_label_move_together():
    for original, _, image, label in _samples(60):
        np.testing.assert_array_equal(original.ravel(), np.arange(1, 281))  # left as it was
        inside = image > 0
        np.testing.assert_array_equal(label[inside], image[inside] % 251)
        assert not label[~inside].any()


def test_each_kind_comes_as_often_as_specified():
    original = next(_samples(1))[0]
    turned = {(np.flip(np.rot90(original, k), axis)).tobytes() for k in range(4) for axis in range(2)}
    turned -= {original.tobytes()}
    rotated = {ndimage.rotate(original, angle, order=0, reshape=False).tobytes() for angle in range(-20, 20) if angle}
    contents = [image.tobytes() for _, _, image, _ in _samples(800)]
    assert set(contents) <= turned | rotated | {original.tobytes()}
    # Four standard deviations of a share of 800; an angle of 0 leaves the rotated ones at 0.25 * 39 / 40.
    assert abs(np.mean([content in turned for content in contents]) - 0.5) < 0.07
    assert abs(np.mean([content in rotated for content in contents]) - 0.244) < 0.06
