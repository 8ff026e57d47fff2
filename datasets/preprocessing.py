"""Convert a stored scan or picture to the network's input: the direction of the axes, and the intensities.

Arrays of this project are (z, y, x). An affine maps the indices (x, y, z) to mm in NIfTI's space, whose axes run to the
patient's right, anterior and superior (R, A, S). Axes are only swapped and reversed; voxels are not interpolated.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasets.errors import DataError, brief

LENGTHS = 1e-6, 1e6
"""Smallest and largest valid side of a voxel in mm (a nanometre, a kilometre); other values mean a damaged header."""

RGB = ("red", "green", "blue")
KINDS = {
    "window": "{:g} and {:g}",
    "percentiles": "the scan's percentiles {:g} and {:g}",
    "deviations": "the scan's mean plus {:g} and {:g} standard deviations",
}


@dataclass(frozen=True)
class Scale:
    """The two intensities of a channel that become 0 and 1; values outside are clipped.

    kind: ``window``: low and high are the intensities; ``percentiles``: low and high are percentiles of each scan;
    ``deviations``: low and high are z-scores, in standard deviations from each scan's mean.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self):
        ends = (0.0, 100.0) if self.kind == "percentiles" else (-np.inf, np.inf)
        if self.kind not in KINDS or not ends[0] <= float(self.low) < float(self.high) <= ends[1]:
            raise ValueError(f"expected one of {', '.join(KINDS)}, and low < high")

    def ends(self, voxels: np.ndarray) -> tuple[float, float]:
        """Return the intensities that become 0 and 1 in a scan; voxels: (z, y, x)."""
        if self.kind == "percentiles":
            low, high = np.percentile(voxels, (self.low, self.high))
            return float(low), float(high)
        if self.kind == "deviations":
            mean = voxels.mean(dtype=float)
            deviation = np.sqrt(np.mean([np.square(z - mean).mean() for z in voxels]))  # one slice at a time
            return mean + self.low * deviation, mean + self.high * deviation
        return self.low, self.high

    def __str__(self) -> str:
        return KINDS[self.kind].format(self.low, self.high)


@dataclass(frozen=True)
class Preprocessing:
    """How every scan of a data set is preprocessed; stored in a checkpoint."""

    orientation: str | None = None  # directions of x, y, z after reorientation, such as ``LAS``; None: as stored
    # Intensities (Hounsfield units for CT) that become 0 and 1; values outside are clipped. None: the scan's own
    # minimum and maximum.
    window: tuple[float, float] | None = None
    # Lowest and highest intensity of the training files, if others prepared these in an unknown way.
    stored: tuple[float, float] | None = None
    # One scale per channel, used instead of ``window``; empty: one channel, scaled by ``window``.
    scales: tuple[Scale, ...] = ()

    def __post_init__(self):
        if self.orientation is not None and not is_orientation(self.orientation):
            raise ValueError("the orientation is not three letters like RAS")
        if self.window is not None and not -np.inf < self.window[0] < self.window[1] < np.inf:
            raise ValueError("the window is not two intensities with low < high")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.scales) or 1

    @property
    def fills_unit(self) -> bool:
        """Whether the intensities of every scan reach 0 and 1."""
        return self.window is None and all(scale.kind == "percentiles" for scale in self.scales)

    def scaled(self, channels: Sequence[np.ndarray]) -> np.ndarray:
        """Scale each channel, (z, y, x), to [0, 1]; return float32 (z, y, x), or (z, y, x, C) for several channels."""
        image = np.empty((*channels[0].shape, len(channels)), np.float32)
        for number, voxels in enumerate(channels):
            low, high = self.window or (float(voxels.min()), float(voxels.max()))
            if self.scales:
                found = self.scales[number].ends(voxels)
                # If nearly all voxels are black around a small object, both percentiles are the same intensity.
                low, high = found if found[0] < found[1] else (low, high)
            for z, plane in enumerate(voxels):  # only one slice at a time is in double precision
                image[z, ..., number] = to_unit(plane, low, high)
        return image if len(channels) > 1 else image[..., 0]

    def to_dict(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores."""
        values = asdict(self).items()  # empty newer fields are left out, as in earlier checkpoints
        return {name: value for name, value in values if value or name in ("orientation", "window")}

    def described(self, img_size: int | str) -> str:
        """Return in words how a scan becomes the network's input; img_size: a number, or the flag that gives it."""
        axes = "as stored" if self.orientation is None else f"reoriented to {self.orientation} (x, y, z)"
        ends = "the scan's minimum and maximum" if self.window is None else "{:g} and {:g}".format(*self.window)
        ends = "; in the next channel ".join(map(str, self.scales)) or ends
        scaled = f"{ends} become 0 and 1, values outside are clipped"
        if self.stored is not None:
            scaled = "prepared like the training files, whose intensities run from {:g} to {:g}".format(*self.stored)
        return (
            f"voxel axes {axes}; z counts slices, y rows, x columns; {scaled}; each slice is resized to {img_size} x "
            f"{img_size} by cubic splines, with corner pixels kept at the corners and the border mirrored"
        )


@dataclass(frozen=True)
class ColourPreprocessing:
    """The normalisation of RGB in [0, 1] to (value - mean) / std, channel by channel; stored in a checkpoint.

    The default is the one with which timm's maxxvit_rmlp weights were trained.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    bits: int | None = None  # bits in use in the 16-bit training images; None: there are none, or all state their own

    def __post_init__(self):
        values = np.array([self.mean, self.std], float)
        if values.shape != (2, 3) or not np.isfinite(values).all() or min(self.std) <= 0:
            raise ValueError("mean and std are not three numbers each")
        if self.bits not in (None, *range(8, 17)):
            raise ValueError("bits are not 8 to 16")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {key: value for key, value in asdict(self).items() if value is not None}  # as in earlier checkpoints

    def described(self, img_size: int | str) -> str:
        """Return the steps from an image to the network's input in words, for users of an exported network."""
        deep = f"; 16-bit values are divided by {2 ** (self.bits - 8)}" if self.bits else ""
        return (
            f"RGB of 8 bits{deep}; an image with a shorter side above {img_size} is shrunk in proportion "
            f"until that side has this length; then it is resized to {img_size} x {img_size}; both steps are bicubic "
            "with antialiasing; v becomes (v / 255 - mean) / std in each channel"
        )

    def normalise(self, image: np.ndarray) -> np.ndarray:
        """Return images as the network's input: uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
        scaled = (image.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def denormalise(self, image: np.ndarray) -> np.ndarray:
        """Return the RGB in [0, 1] of normalised images: float32 (..., 3, H, W) to (..., H, W, 3)."""
        return np.clip(np.moveaxis(image, -3, -1) * np.float32(self.std) + np.float32(self.mean), 0, 1)


def preprocessing_from_dict(values: dict[str, Any]) -> Preprocessing | ColourPreprocessing:
    """Return the preprocessing of scans or of colour images from the result of ``to_dict``; raises DataError."""
    try:
        if "mean" in values:
            mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
            return ColourPreprocessing(mean, std, values.get("bits"))
        pairs = values["window"], values.get("stored")
        window, stored = (None if pair is None else (float(pair[0]), float(pair[1])) for pair in pairs)
        scales = tuple(Scale(str(s["kind"]), float(s["low"]), float(s["high"])) for s in values.get("scales", ()))
        return Preprocessing(values["orientation"], window, stored, scales)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"the preprocessing {brief(values)} is not valid ({brief(error)})") from error


def to_unit(image: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Return an image as float32 in [0, 1]: ``low`` becomes 0, ``high`` becomes 1, values outside are clipped.

    low, high: by default the image's own minimum and maximum. If high is not above low, the result is 0 everywhere.
    """
    low = float(image.min()) if low is None else low
    high = float(image.max()) if high is None else high
    if high <= low:
        return np.zeros(image.shape, np.float32)
    return ((np.clip(image, low, high).astype(np.float64) - low) / (high - low)).astype(np.float32)


def is_orientation(text: object) -> bool:
    """Return whether a text is one of the 48 possible orientations of three axes, such as ``RAS``."""
    return isinstance(text, str) and bool(re.fullmatch("(?=.*[LR])(?=.*[AP])(?=.*[SI])[LRAPSI]{3}", text))


def is_affine(matrix: np.ndarray) -> bool:
    """Return whether a matrix, float64 (4, 4), is a valid affine: invertible, with voxel sides within ``LENGTHS``."""
    if not (np.abs(matrix) < 1e30).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):  # also rejects NaN
        return False
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    possible = LENGTHS[0] <= lengths.min() <= lengths.max() <= LENGTHS[1]
    return bool(possible and np.linalg.matrix_rank(matrix[:3, :3]) == 3)


def orientation_of(affine: np.ndarray) -> str:
    """Return three letters (``LPS``): for each of the axes x, y and z of an affine, the nearest of six directions."""
    from nibabel import aff2axcodes

    return "".join(letter or "?" for letter in aff2axcodes(affine))


def is_rigid(affine: np.ndarray) -> bool:
    """Return whether the axes of an affine are at right angles; in a CT with a tilted gantry they are not."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)


def upright(affine: np.ndarray) -> np.ndarray:
    """Return an affine with its slice axis turned to a right angle, as a qform needs it and ITK reads a tilted CT."""
    axes, sides = np.linalg.qr(affine[:3, :3])
    straight = affine.copy()
    straight[:3, :3] = axes * np.sign(np.diag(sides)) * np.linalg.norm(affine[:3, :3], axis=0)
    return straight


def reorient(array: np.ndarray, affine: np.ndarray, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """Swap and reverse the axes of an array so that they have the given directions.

    array: (z, y, x); affine: float64 (4, 4) of its indices; orientation: three letters such as ``LAS``. Returns a view
    of the array, whose strides may be negative, and its new affine, with which every voxel keeps its position in mm.
    """
    from nibabel import orientations

    wanted = orientations.axcodes2ornt(tuple(orientation))
    change = orientations.ornt_transform(orientations.io_orientation(affine), wanted)
    array = array.T  # (x, y, z), the order of nibabel
    turned = orientations.apply_orientation(array, change)
    return turned.T, affine @ orientations.inv_ornt_aff(change, array.shape)
