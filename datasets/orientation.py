"""Which way the axes of an array run in the patient, and how an array is turned to run another way and back.

Arrays of this project are (z, y, x); an affine takes the indices (x, y, z) to mm in NIfTI's space, whose axes run to
the patient's right, anterior and superior (R, A, S). Axes are only ever swapped and reversed, never interpolated.
"""

import re

import numpy as np

LENGTHS = 1e-6, 1e6
"""Least and greatest length of a voxel in mm, a nanometre and a kilometre; what lies beyond is a damaged number."""


def is_orientation(text: object) -> bool:
    """Return whether this is one of the 48 ways that three axes can run, as ``RAS``."""
    return isinstance(text, str) and bool(re.fullmatch("(?=.*[LR])(?=.*[AP])(?=.*[SI])[LRAPSI]{3}", text))


def is_affine(matrix: np.ndarray) -> bool:
    """Return whether a float64 (4, 4) takes indices to mm: it has an inverse, and a voxel sides within ``LENGTHS``."""
    if not (np.abs(matrix) < 1e30).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):  # NaN is not below anything
        return False
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    return bool(
        LENGTHS[0] <= lengths.min() <= lengths.max() <= LENGTHS[1] and np.linalg.matrix_rank(matrix[:3, :3]) == 3
    )


def orientation_of(affine: np.ndarray) -> str:
    """Return the three letters of an affine, the direction that each of x, y and z runs in (``LPS``), nearest axis."""
    from nibabel import aff2axcodes

    return "".join(letter or "?" for letter in aff2axcodes(affine))


def reorient(array: np.ndarray, affine: np.ndarray, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """Swap and reverse the axes of an array until they run the given way.

    array: (z, y, x); affine: float64 (4, 4) of its indices; orientation: three letters, as ``LAS``. Returns a view of
    the array and the affine that keeps every voxel where it lies.
    """
    from nibabel import orientations

    change = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(tuple(orientation))
    )
    array = array.T  # (x, y, z), as nibabel counts
    turned = orientations.apply_orientation(array, change)
    return turned.T, affine @ orientations.inv_ornt_aff(change, array.shape)


def nifti_image(
    array: np.ndarray, affine: np.ndarray | None, spacing: tuple[float, float, float] | None, orientation: str | None
):
    """Return a nibabel image of an array (z, y, x), its axes running as in the file that the array came from.

    affine: of the array, or None: then its spacing (z, y, x) is the diagonal, and without that a voxel is 1 mm;
    orientation: of the file, or None for the array's own.
    """
    import nibabel

    if affine is None:
        z, y, x = spacing or (1.0, 1.0, 1.0)
        affine = np.diag([x, y, z, 1.0])
    if orientation is not None:
        array, affine = reorient(array, affine, orientation)
    image = nibabel.Nifti1Image(np.asarray(array).T, affine, dtype=array.dtype)
    # Both forms, as scanner coordinates: programs differ in which of the two they read.
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1 if _is_rigid(affine) else 0)
    image.header.set_xyzt_units("mm")
    return image


def _is_rigid(affine: np.ndarray) -> bool:
    """Return whether the axes stand at right angles, all that a qform can say."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)
