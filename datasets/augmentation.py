"""The training augmentation of the specification: a quarter turn with a flip, or a small rotation, or nothing.

What is done to a sample is drawn first and done after, by numpy and scipy here or by torch on the network's device
(``finish_on_device``): the same to every pixel, but for one that lies halfway between two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from datasets.resize import zoom_cubic, zoom_nearest


class Change(NamedTuple):
    """What is done to a sample: quarter turns and then a flip of an axis, or a rotation by degrees, or nothing."""

    turns: int = 0
    flipped_axis: int | None = None
    angle: int = 0


def draw(rng: np.random.Generator) -> Change:
    """Draw a change.

    With probability 1/2 a random multiple of 90 degrees and a flip of a random axis; else with probability 1/2 a
    rotation by a whole angle in [-20, 20) degrees; else nothing.
    """
    if rng.random() < 0.5:
        return Change(turns=int(rng.integers(4)), flipped_axis=int(rng.integers(2)))
    if rng.random() < 0.5:
        return Change(angle=int(rng.integers(-20, 20)))
    return Change()


def augment(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turn and mirror, or rotate, an image and its label alike, as ``draw`` draws it.

    image: (H, W) or (H, W, 3); label: (H, W). A rotation takes nearest neighbours and fills with 0. Returns
    (image, label), after an odd number of quarter turns (W, H).
    """
    change = draw(rng)
    if change.flipped_axis is not None:
        image, label = (
            np.ascontiguousarray(np.flip(np.rot90(array, change.turns), change.flipped_axis))
            for array in (image, label)
        )
    elif change.angle:
        image, label = (ndimage.rotate(array, change.angle, order=0, reshape=False) for array in (image, label))
    return image, label


def finish_on_device(
    images: Sequence[Tensor], labels: Sequence[Tensor], changes: Sequence[Change], img_size: int
) -> tuple[Tensor, Tensor]:
    """Augment slices and resize them, where they lie: the device is never waited for.

    images: float32 (H, W) each, of any size; labels: (H, W) each. Returns float32 (B, 1, S, S), cubic, and int64
    (B, S, S), nearest.
    """
    size, finished_images, finished_labels = (img_size, img_size), [], []
    for image, label, change in zip(images, labels, changes, strict=True):
        if change.flipped_axis is not None:
            image, label = (x.rot90(change.turns).flip(change.flipped_axis) for x in (image, label))
        elif change.angle:
            source, inside = _rotation(image.shape, change.angle, image.device)
            image, label = (torch.where(inside, x.take(source), 0) for x in (image, label))
        finished_images.append(zoom_cubic(image, size))
        finished_labels.append(zoom_nearest(label, size))
    return torch.stack(finished_images)[:, None], torch.stack(finished_labels).long()


def _rotation(shape: tuple[int, int], angle: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which pixel (as index of the flat map) each one of a rotated map shows, and whether there is one."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    height, width = shape
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2
    y, x = cosine * y + sine * x + (height - 1) / 2, cosine * x - sine * y + (width - 1) / 2
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    row, column = (t.add(0.5).floor().long() for t in (y, x))
    return row.clamp(0, height - 1) * width + column.clamp(0, width - 1), inside
