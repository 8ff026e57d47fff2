"""The training augmentation of the specification: a quarter turn with a flip, or a small rotation, or nothing."""

import numpy as np
from scipy import ndimage


def augment(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turn and mirror, or rotate, an image and its label alike.

    image: (H, W) or (H, W, 3); label: (H, W). With probability 1/2 a random multiple of 90 degrees and a flip of a
    random axis; else with probability 1/2 a rotation by a whole angle in [-20, 20) degrees, nearest neighbour, filled
    with 0; else unchanged. Returns (image, label), after an odd number of quarter turns (W, H).
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        image, label = (np.ascontiguousarray(np.flip(np.rot90(array, turns), axis)) for array in (image, label))
    elif rng.random() < 0.5:
        angle = int(rng.integers(-20, 20))
        image, label = (ndimage.rotate(array, angle, order=0, reshape=False) for array in (image, label))
    return image, label
