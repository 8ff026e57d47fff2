"""Resizing of maps, equal to scipy.ndimage.zoom and several times faster.

Spline interpolation is linear and separable: zooming a map (H, W) to (h, w) is ``A_y @ map @ A_x.T`` with one matrix
per axis, and nearest neighbour is one index vector per axis. Both come from scipy itself, once per pair of sizes.

One departure from scipy's default, and so from the release: for about one pair of sizes in twenty (512 to 224, 256 to
216) rounding puts the last position a hair outside the map, and mode "constant" makes that whole row or column zero.
Modes "mirror" and "nearest" give the same values elsewhere and the map's own border there.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def resize_cubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize the last two axes with cubic splines, as scipy.ndimage.zoom(order=3) does to about 1e-6 of the range.

    image: (..., H, W), any real type; size: (h, w). Returns float32 (..., h, w).
    """
    # By torch, whose threads are the network's, and one in a loader's worker: numpy's would stand in their way.
    return zoom_cubic(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)), size).numpy()


def resize_nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize the last two axes to the nearest neighbour, as scipy.ndimage.zoom(order=0) does.

    label: (..., H, W); size: (h, w). Returns (..., h, w) of the same type.
    """
    label = np.asarray(label)
    rows, columns = (_nearest_index(*n, torch.device("cpu")).numpy() for n in zip(label.shape[-2:], size, strict=True))
    return np.ascontiguousarray(label[..., rows[:, None], columns])


def zoom_cubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Do what ``resize_cubic`` does to float32 (..., H, W) where it lies."""
    if image.shape[-2:] == tuple(size):
        return image.clone()
    rows, columns = (_cubic_matrix(*n, image.device) for n in zip(image.shape[-2:], size, strict=True))
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image @ columns.T


def zoom_nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Do what ``resize_nearest`` does to (..., H, W) where it lies."""
    rows, columns = (_nearest_index(*n, label.device) for n in zip(label.shape[-2:], size, strict=True))
    return label[..., rows[:, None], columns]


@lru_cache(maxsize=1024)
def _cubic_matrix(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Return the float32 (size_out, size_in) matrix of scipy's cubic zoom along one axis; not to be written to."""
    matrix = ndimage.zoom(np.eye(size_in), (size_out / size_in, 1), order=3, mode="mirror")
    # A spline's weights decay for ever; the subnormal ones would slow the product down many times.
    matrix[np.abs(matrix) < 1e-9] = 0
    return _checked(matrix.astype(np.float32), size_in, size_out).to(device)


@lru_cache(maxsize=1024)
def _nearest_index(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Return the int64 (size_out,) positions that scipy's zoom of order 0 picks on one axis; not to be written to."""
    positions = ndimage.zoom(np.arange(size_in), size_out / size_in, order=0, mode="nearest")
    return _checked(positions.astype(np.int64), size_in, size_out).to(device)


def _checked(array: np.ndarray, size_in: int, size_out: int) -> Tensor:
    # scipy rounds size_in * (size_out / size_in); a pair where that is not size_out must not pass unseen.
    if len(array) != size_out:
        raise ArithmeticError(f"zoom from {size_in} to {size_out} gave {len(array)} positions")
    return torch.from_numpy(array)
