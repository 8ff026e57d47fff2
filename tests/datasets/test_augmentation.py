"""Augmentation moves image and label alike, as often and as far as the specification says."""

import numpy as np
from scipy import ndimage

from datasets.transforms import augment


def _samples(count):
    image = np.arange(1, 20 * 14 + 1, dtype=np.float32).reshape(20, 14)
    label = (image % 251).astype(np.uint8)
    for seed in range(count):
        yield image, label, *augment(image, label, np.random.default_rng(seed))


def test_image_and_label_move_together():
    for _, _, image, label in _samples(60):
        inside = image > 0
        np.testing.assert_array_equal(label[inside], image[inside] % 251)
        assert not label[~inside].any()


def test_each_kind_comes_as_often_as_specified():
    original = next(_samples(1))[0]
    turned = {(np.flip(np.rot90(original, k), axis)).tobytes() for k in range(4) for axis in range(2)}
    rotated = {
        ndimage.rotate(original, angle, order=0, reshape=False).tobytes() for angle in range(-20, 20) if angle != 0
    }
    kinds = {"turned": 0, "rotated": 0, "unchanged": 0}
    for _, _, image, _ in _samples(800):
        content = image.tobytes()
        if content == original.tobytes():
            kinds["unchanged"] += 1
        elif content in turned:
            kinds["turned"] += 1
        else:
            assert content in rotated
            kinds["rotated"] += 1
    # Four standard deviations of a share of 800; an angle of 0 leaves the rotated ones at 0.25 * 39 / 40.
    assert abs(kinds["turned"] / 800 - 0.5) < 0.07
    assert abs(kinds["rotated"] / 800 - 0.244) < 0.06


def test_the_same_generator_gives_the_same_and_the_original_is_left_alone():
    image, label = np.random.default_rng(0).random((9, 7)), np.ones((9, 7), np.uint8)
    before = image.copy()
    for seed in range(20):
        first, second = (augment(image, label, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(image, before)
