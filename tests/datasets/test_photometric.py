"""The photometric augmentation bends image and label alike."""

import sys

import numpy as np
import pytest

from datasets import photometric as module
from datasets.photometric import photometric

pytest.importorskip("imgaug")


def bands(height=120, width=90):
    """Return an image whose red is 20 + 100 * label, and the label: wavy bands, one at every border."""
    y, x = np.mgrid[:height, :width]
    label = ((y + 6 * np.sin(x / 9)) // 15 % 3).astype(np.uint8)
    image = np.stack([20 + 100 * label, np.full_like(label, 90), np.full_like(label, 60)], -1)
    return image, label


def test_image_and_label_are_bent_alike_up_to_the_border(monkeypatch):
    for name, value in dict(BRIGHTNESS=0, CONTRAST=0, SATURATION=0, HUE=0, BLUR=0, ELASTIC=6.0, SHARE=1).items():
        monkeypatch.setattr(module, name, value)
    image, label = bands()
    moved = 0
    for seed in range(10):
        bent, bent_label = photometric(image, label, np.random.default_rng(seed))
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
    refused(lambda: photometric(*bands(), np.random.default_rng(0)), "imgaug", "requirements.txt")
