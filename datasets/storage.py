"""Reading arrays from HDF5 and npz files that may be damaged, hostile or of another kind.

Nothing is unpickled, and no array is read before its declared size has been compared with ``MAX_BYTES``.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import h5py
import numpy as np

from datasets.errors import DataError
from datasets.orientation import is_orientation

MAX_BYTES = 4 * 2**30
"""Largest array that is read, in bytes: about eight times a float32 CT volume of 512 x 512 x 512."""

IMAGE_KEYS = ("image", "img")
"""Names of the image in a file: TransUNet's and MT-UNet's."""

TEXTS = ("class_names", "orientation", "stored_type")
FACTS = (*TEXTS, "spacing", "affine")
"""What a file may say beside its arrays."""

_PREPARE = "prepare the data again (prepare_data.py) or replace the file"


def read_fields(path: str | Path) -> dict[str, np.ndarray]:
    """Read ``image``, ``label`` and what ``FACTS`` the file has.

    path: ``.npz``, or anything else as HDF5 (where the facts are attributes). Returns a dictionary of arrays,
    with the image under ``image``. Raises DataError for a file that is absent, damaged, without a key or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; prepare the data (prepare_data.py) or correct the path or list")
    read, kind = (_read_npz, "npz") if path.suffix == ".npz" else (_read_hdf5, "HDF5")
    try:
        return read(path)
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: not a readable {kind} file, truncated or of another kind ({reason}); {_PREPARE}"
        ) from error


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        fields = {}
        for name, key in _array_keys(path, file.keys()).items():
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(f"{path}: '{key}' is a group, an array was expected; {_PREPARE}")
            check_declared(path, key, dataset.shape, dataset.dtype)
            fields[name] = dataset[()]
        fields |= {key: file.attrs[key] for key in FACTS if key in file.attrs}
    return fields


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        keys = _array_keys(path, members)
        keys |= {key: key for key in FACTS if key in members}
        for key in keys.values():
            with archive.open(members[key]) as member:
                check_declared(path, key, *_npy_header(member), text_allowed=key in TEXTS)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[key] for name, key in keys.items()}


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"array format {version}")
    shape, _, dtype = read_header[version](member)
    return shape, dtype


def _array_keys(path: Path, found: Iterable[str]) -> dict[str, str]:
    image = next((key for key in IMAGE_KEYS if key in found), None)
    if image is None or "label" not in found:
        missing = "label" if image else "image"
        raise DataError(
            f"{path}: has no '{missing}', only {', '.join(sorted(found)) or 'nothing'}; "
            f"'image' (or 'img') and 'label' were expected; {_PREPARE}"
        )
    return {"image": image, "label": "label"}


def check_declared(
    path: str | Path,
    key: str,
    shape: tuple[int, ...] | None,
    dtype: np.dtype,
    text_allowed: bool = False,
    remedy: str = _PREPARE,
) -> None:
    """Raise DataError unless an array of this declared shape and type is numeric and at most ``MAX_BYTES`` long."""
    if dtype.kind not in ("biufU" if text_allowed else "biuf"):
        raise DataError(f"{path}: '{key}' holds {dtype}, numbers were expected; {remedy}")
    size = math.prod(shape or ()) * dtype.itemsize
    if size > MAX_BYTES:
        raise DataError(
            f"{path}: '{key}' declares shape {tuple(shape)}, {size / 2**30:.1f} GiB, more than the "
            f"{MAX_BYTES / 2**30:.0f} GiB that are read; {remedy}"
        )


def checked_image(path: str | Path, image: np.ndarray, ndim: int) -> np.ndarray:
    """Return the image as finite float32 of ``ndim`` axes, none of them empty, or raise DataError."""
    if image.ndim != ndim or 0 in image.shape:
        expected = {2: "(H, W)", 3: "(slices, H, W)"}[ndim]
        raise DataError(f"{path}: the image has shape {image.shape}, {expected} was expected; {_PREPARE}")
    with np.errstate(over="ignore"):
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise DataError(f"{path}: the image has {count} values that are NaN or infinite; {_PREPARE}")
    return image


def checked_label(
    path: str | Path, label: np.ndarray, shape: tuple[int, ...], num_classes: int | None = None
) -> np.ndarray:
    """Return the label as uint8 class indices of the image's shape, or raise DataError.

    num_classes: number of classes with background; None accepts every index up to 255.
    """
    if label.shape != shape:
        raise DataError(f"{path}: the label has shape {label.shape}, the image {shape}; {_PREPARE}")
    if label.dtype.kind == "f" and not (np.isfinite(label).all() and np.array_equal(label, np.rint(label))):
        raise DataError(f"{path}: the label holds values that are not whole numbers; {_PREPARE}")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > 255:
        raise DataError(f"{path}: label ids run from {low} to {high}, 0 to 255 were expected; {_PREPARE}")
    if num_classes is not None and high >= num_classes:
        raise DataError(
            f"{path}: label id {high} with num_classes {num_classes}; ids from 0 to {num_classes - 1} were expected: "
            "set --num_classes to the data set's number of classes with background, or correct the labels"
        )
    return label.astype(np.uint8, copy=False)


def checked_class_names(path: str | Path, names: np.ndarray | Iterable) -> tuple[str, ...]:
    """Return class names (background excluded) as a tuple of strings, or raise DataError."""
    names = tuple(name.decode() if isinstance(name, bytes) else name for name in np.atleast_1d(names).tolist())
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: class_names holds {names}, text was expected; {_PREPARE}")
    return names


def checked_geometry(
    path: str | Path, spacing: np.ndarray | None, affine: np.ndarray | None
) -> tuple[tuple[float, float, float] | None, np.ndarray | None]:
    """Return (spacing, affine) as ((z, y, x) mm, (4, 4) float64), each None where absent, or raise DataError."""
    if spacing is not None:
        spacing = np.asarray(spacing)
        if spacing.shape != (3,) or spacing.dtype.kind not in "iuf" or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise DataError(f"{path}: spacing is {spacing.tolist()}, three lengths in mm were expected; {_PREPARE}")
        spacing = tuple(float(length) for length in spacing)
    if affine is not None:
        affine = np.asarray(affine)
        if affine.shape != (4, 4) or affine.dtype.kind not in "iuf" or not np.isfinite(affine).all():
            raise DataError(f"{path}: affine has shape {affine.shape}, 4 x 4 finite numbers were expected; {_PREPARE}")
        affine = affine.astype(np.float64)
    return spacing, affine


def checked_origin(path: str | Path, orientation: object, stored_type: object) -> tuple[str | None, str | None]:
    """Return (orientation as ``RAS``, number type as ``int16``), each None where absent, or raise DataError."""
    values = [value.item() if isinstance(value, np.ndarray) else value for value in (orientation, stored_type)]
    orientation, stored_type = (value.decode() if isinstance(value, bytes) else value for value in values)
    if orientation is not None and not is_orientation(orientation):
        raise DataError(f"{path}: orientation is {orientation!r}, three letters like RAS were expected; {_PREPARE}")
    if stored_type is not None and not re.fullmatch("u?int(8|16|32|64)|float(16|32|64)", str(stored_type)):
        raise DataError(f"{path}: stored_type is {stored_type!r}, one like int16 was expected; {_PREPARE}")
    return orientation, stored_type
