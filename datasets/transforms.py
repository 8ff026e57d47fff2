"""Augment and resize slices and images.

Resizing equals scipy.ndimage.zoom and is several times faster. Spline interpolation is linear and separable: zooming a
map (H, W) to (h, w) is ``A_y @ map @ A_x.T`` with one matrix per axis, and nearest neighbour is one index vector per
axis. scipy computes both once per pair of sizes.

One departure from scipy's default, and so from the release: for about one pair of sizes in twenty (512 to 224, 256 to
216) rounding puts the last position slightly outside the map, and mode "constant" makes that whole row or column zero.
Here, modes "mirror" and "nearest" put the map's border there; all other values are the same.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def augment(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip, or rotate, an image and its label in the same way.

    With probability 1/2, turn by a random multiple of 90 degrees and flip a random axis. With probability 1/4, rotate
    by a random whole angle in [-20, 20) degrees (nearest neighbour, filled with 0). Otherwise change nothing.

    image: (H, W) or (H, W, C); label: (H, W). Returns (image, label); an odd number of quarter turns swaps H and W.
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        image, label = (np.ascontiguousarray(np.flip(np.rot90(array, turns), axis)) for array in (image, label))
    elif rng.random() < 0.5:
        angle = int(rng.integers(-20, 20))
        image, label = (ndimage.rotate(array, angle, order=0, reshape=False) for array in (image, label))
    return image, label


def resize_cubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize the last two axes by cubic splines; equals scipy.ndimage.zoom(order=3) to about 1e-6 of the range.

    image: (..., H, W), any real type; size: (h, w). Returns float32 (..., h, w).
    """
    # torch uses one thread in a data-loader worker; numpy's threads would compete with the network's.
    image = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    if image.shape[-2:] == tuple(size):
        return image.clone().numpy()
    rows, columns = (_cubic_matrix(*n) for n in zip(image.shape[-2:], size, strict=True))
    with torch.autocast("cpu", enabled=False):  # prediction calls this inside the network's autocast
        return (rows @ image @ columns.T).numpy()


def resize_nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize the last two axes by nearest neighbour; equals scipy.ndimage.zoom(order=0).

    label: (..., H, W); size: (h, w). Returns (..., h, w) of the same type.
    """
    label = np.asarray(label)
    rows, columns = (_nearest_index(*n) for n in zip(label.shape[-2:], size, strict=True))
    return np.ascontiguousarray(label[..., rows[:, None], columns])


@lru_cache(maxsize=1024)
def _cubic_matrix(size_in: int, size_out: int) -> Tensor:
    """Return the float32 (size_out, size_in) matrix of scipy's cubic zoom along one axis; read only."""
    matrix = ndimage.zoom(np.eye(size_in), (size_out / size_in, 1), order=3, mode="mirror")
    # The weights of a spline never decay to 0; subnormal weights would make the product many times slower.
    matrix[np.abs(matrix) < 1e-9] = 0
    return torch.from_numpy(matrix.astype(np.float32))


@lru_cache(maxsize=1024)
def _nearest_index(size_in: int, size_out: int) -> np.ndarray:
    """Return the int64 (size_out,) positions that scipy's zoom of order 0 takes along one axis; read only."""
    return ndimage.zoom(np.arange(size_in), size_out / size_in, order=0, mode="nearest")
