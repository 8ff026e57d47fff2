"""From a scan as stored to the image that a network sees: the direction of the axes, and the intensities.

Arrays of this project are (z, y, x). An affine maps the indices (x, y, z) to mm in NIfTI's space, whose axes run to the
patient's right, anterior and superior (R, A, S). Axes are only swapped and reversed, never interpolated.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasets.errors import DataError, brief

LENGTHS = 1e-6, 1e6
"""Smallest and largest side of a voxel in mm (a nanometre, a kilometre); other values are damaged numbers."""


KINDS = ("window", "percentiles", "deviations")


@dataclass(frozen=True)
class Scale:
    """Which two intensities of a channel become 0 and 1; values beyond are clipped.

    kind: ``window``: low and high themselves; ``percentiles``: these two of each scan; ``deviations``: each scan's mean
    plus so many of its standard deviations, which is its z-score, clipped and moved to [0, 1].
    """

    kind: str
    low: float
    high: float

    def __post_init__(self):
        ends = (0.0, 100.0) if self.kind == "percentiles" else (-np.inf, np.inf)
        if self.kind not in KINDS or not ends[0] <= float(self.low) < float(self.high) <= ends[1]:
            raise ValueError(f"expected one of {', '.join(KINDS)} and two rising numbers")

    def ends(self, voxels: np.ndarray) -> tuple[float, float]:
        """Return the two intensities, of a scan's voxels (z, y, x)."""
        if self.kind == "percentiles":
            low, high = np.percentile(voxels, (self.low, self.high))
            return float(low), float(high)
        if self.kind == "deviations":
            mean = voxels.mean(dtype=float)
            deviation = np.sqrt(np.mean([np.square(z - mean).mean() for z in voxels]))  # a slice at a time
            return mean + self.low * deviation, mean + self.high * deviation
        return self.low, self.high

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        text = {"window": "{} and {}", "percentiles": "the scan's percentiles {} and {}"}
        return text.get(self.kind, "the scan's mean with {} and {} standard deviations").format(low, high)


@dataclass(frozen=True)
class Preprocessing:
    """How every scan of a data set is preprocessed; stored in a checkpoint."""

    orientation: str | None = None  # direction of x, y and z after reorientation, as ``LAS``; None: as stored
    # Intensities (Hounsfield units for CT) that become 0 and 1; values outside are clipped. None: the scan's own
    # minimum and maximum.
    window: tuple[float, float] | None = None
    # Lowest and highest intensity of the training files, where others prepared them in a way that is not known here.
    stored: tuple[float, float] | None = None
    # Of each channel, in place of a window; none: one channel.
    scales: tuple[Scale, ...] = ()

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.scales) or 1

    @property
    def fills_unit(self) -> bool:
        """Whether the intensities of every scan reach 0 and 1."""
        return self.window is None and all(scale.kind == "percentiles" for scale in self.scales)

    def to_dict(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores."""
        values = asdict(self)
        for name in ("stored", "scales"):
            if not values[name]:  # as earlier versions wrote it
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing that ``to_dict`` described; raises DataError for anything else."""
        try:
            orientation, window, stored = values["orientation"], values["window"], values.get("stored")
            window = None if window is None else (float(window[0]), float(window[1]))
            stored = None if stored is None else (float(stored[0]), float(stored[1]))
            scales = tuple(Scale(str(s["kind"]), float(s["low"]), float(s["high"])) for s in values.get("scales", ()))
            if orientation is not None and not is_orientation(orientation):
                raise ValueError("the orientation is not three letters like RAS")
            if window is not None and not -np.inf < window[0] < window[1] < np.inf:
                raise ValueError("the window is not two rising intensities")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DataError(
                f"the checkpoint's preprocessing {brief(values)} is not valid ({brief(error)}); train again"
            ) from error
        return cls(orientation, window, stored, scales)

    def described(self, img_size: int) -> str:
        """Return in words how a scan becomes the network's input, for other programs."""
        if self.stored is not None:
            return "prepared like the training files, whose intensities run from {:g} to {:g}".format(*self.stored)
        axes = "as stored" if self.orientation is None else f"reoriented to {self.orientation} (x, y, z)"
        ends = "the scan's minimum and maximum" if self.window is None else "{:g} and {:g}".format(*self.window)
        ends = "; of the next channel ".join(map(str, self.scales)) or ends
        return (
            f"voxel axes {axes}; slices across z, rows along y, columns along x; {ends} become 0 and 1, values beyond "
            f"are clipped; each slice resized to {img_size} x {img_size} by cubic splines, corner pixels on corner "
            "pixels, mirrored at the border"
        )


def to_unit(image: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Return an image as float32 in [0, 1]: ``low`` becomes 0, ``high`` becomes 1, values beyond are clipped.

    low, high: by default the image's own minimum and maximum. Where high is not above low, everything is 0.
    """
    low = float(image.min()) if low is None else low
    high = float(image.max()) if high is None else high
    if high <= low:
        return np.zeros(image.shape, np.float32)
    return ((np.clip(image, low, high).astype(np.float64) - low) / (high - low)).astype(np.float32)


class ScanImage:
    """The image of a scan, scaled to [0, 1] slice by slice on access, so that only the stored voxels are in memory.

    voxels: (z, y, x), as stored; intensities are ``slope * voxels + intercept``. ``image[part]`` returns float32:
    (H, W) for a number, (n, H, W) for any other index of the first axis.
    """

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(
        self, voxels: np.ndarray, slope: float, intercept: float, preprocessing: Preprocessing, channel: int = 0
    ):
        self.voxels, self.slope, self.intercept = voxels, slope, intercept
        self.shape = voxels.shape
        with np.errstate(over="ignore"):
            ends = self.intensities(np.array([voxels.min(), voxels.max()]))
        self.extent = float(ends.min()), float(ends.max())  # the lowest and the highest intensity
        self.low, self.high = preprocessing.window or self.extent
        if preprocessing.scales and np.isfinite(self.extent).all():
            self.low, self.high = preprocessing.scales[channel].ends(self.intensities(voxels))

    def intensities(self, voxels: np.ndarray) -> np.ndarray:
        """Return what some of the stored voxels mean."""
        return voxels if (self.slope, self.intercept) == (1, 0) else voxels * self.slope + self.intercept

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part) -> np.ndarray:
        return to_unit(self.intensities(self.voxels[part]), self.low, self.high)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        image = np.empty(self.shape, dtype or self.dtype)
        for z in range(len(self)):  # only one slice at a time is in double precision
            image[z] = self[z]
        return image


class ChannelImage(ScanImage):
    """The images of several channels as one of the shape (D, H, W, C), computed slice by slice on access."""

    ndim = 4

    def __init__(self, images: Sequence[ScanImage]):
        self.images = images
        self.shape = (*images[0].shape, len(images))
        self.extent = min(image.extent[0] for image in images), max(image.extent[1] for image in images)

    def __getitem__(self, part) -> np.ndarray:
        return np.stack([image[part] for image in self.images], -1)


def is_orientation(text: object) -> bool:
    """Return whether this is one of the 48 directions that three axes can have, as ``RAS``."""
    return isinstance(text, str) and bool(re.fullmatch("(?=.*[LR])(?=.*[AP])(?=.*[SI])[LRAPSI]{3}", text))


def is_affine(matrix: np.ndarray) -> bool:
    """Return whether a float64 (4, 4) maps indices to mm: it is invertible and voxels' sides are in ``LENGTHS``."""
    if not (np.abs(matrix) < 1e30).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):  # false for NaN, too
        return False
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    return bool(
        LENGTHS[0] <= lengths.min() <= lengths.max() <= LENGTHS[1] and np.linalg.matrix_rank(matrix[:3, :3]) == 3
    )


def orientation_of(affine: np.ndarray) -> str:
    """Return the directions of x, y and z under an affine as three letters (``LPS``), each the nearest of the six."""
    from nibabel import aff2axcodes

    return "".join(letter or "?" for letter in aff2axcodes(affine))


def is_rigid(affine: np.ndarray) -> bool:
    """Return whether the axes of an affine are at right angles; those of a CT with a tilted gantry are not."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)


def reorient(array: np.ndarray, affine: np.ndarray, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """Swap and reverse the axes of an array so that they have the given directions.

    array: (z, y, x); affine: float64 (4, 4) of its indices; orientation: three letters, as ``LAS``. Returns a view of
    the array, whose strides may be negative, and its affine, by which every voxel stays in its place in mm.
    """
    from nibabel import orientations

    change = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(tuple(orientation))
    )
    array = array.T  # (x, y, z), the order of nibabel
    turned = orientations.apply_orientation(array, change)
    return turned.T, affine @ orientations.inv_ornt_aff(change, array.shape)


def nifti_image(
    array: np.ndarray, affine: np.ndarray | None, spacing: tuple[float, float, float] | None, orientation: str | None
):
    """Return a nibabel image of an array (z, y, x), with axes as in the file from which the array was read.

    affine: of the array; if None, it is diagonal with the spacing (z, y, x), or with 1 mm without a spacing;
    orientation: of the file; if None, the array's own.
    """
    import nibabel

    if affine is None:
        z, y, x = spacing or (1.0, 1.0, 1.0)
        affine = np.diag([x, y, z, 1.0])
    if orientation is not None:
        array, affine = reorient(array, affine, orientation)
    image = nibabel.Nifti1Image(np.asarray(array).T, affine, dtype=array.dtype)
    # Both forms, because some programs read only one of them. A qform cannot express axes that are not at right angles;
    # it gets rows and columns as they are and slices at right angles to them, as ITK reads a tilted DICOM series.
    axes, sides = np.linalg.qr(affine[:3, :3])
    upright = affine.copy()
    upright[:3, :3] = axes * np.sign(np.diag(sides)) * np.linalg.norm(affine[:3, :3], axis=0)
    image.set_sform(affine, code=1)
    image.set_qform(upright, code=1)
    image.header.set_xyzt_units("mm")
    return image
