"""Read and check the arrays of HDF5 and npz files, and translate their label ids.

Files may be damaged or come from other people: nothing is unpickled, and no array larger than ``MAX_BYTES`` is read.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from datasets.errors import DataError, brief, counted
from datasets.preprocessing import LENGTHS, is_affine, is_orientation

MAX_BYTES = 4 * 2**30
"""Size in bytes of the largest array that is read. A number counts as at least 4 bytes, because it may become float32.
This is eight times the size of a float32 CT volume of 512 x 512 x 512."""

MAX_INFLATION = 1032
"""Largest number of bytes that one byte of a deflate stream (zip, gzip, HDF5) can stand for."""

MAX_VALUE = 65535
"""Largest value that a label may hold before its values are mapped to class indices."""

PREPARE = "prepare the file again, or replace it"


@contextmanager
def reading(path: str | Path, what: str, remedy: str = PREPARE) -> Iterator[None]:
    """Turn every error of the ``with`` block, which reads ``path``, into a DataError of one line that names the file.

    what: the expected kind of file; remedy: what the user can do; both for the message. A DataError is not changed.
    """
    if not Path(path).exists():
        raise DataError(f"{path}: no such file; correct the path or list, or copy the file there")
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into the free memory; close other programs or crop the data") from error
    except Exception as error:  # h5py, zipfile, numpy, gzip, nibabel and Pillow each raise many kinds of error
        reason = brief(str(error).replace(str(path), Path(path).name))
        raise DataError(
            f"{path}: not a readable {what}: truncated, damaged or another file type ({reason}); {remedy}"
        ) from error


def read_fields(path: str | Path, ndim: int, labelled: bool = True) -> dict[str, Any]:
    """Return a file's checked image, its label as stored if ``labelled``, and its metadata as arguments of ``Volume``.

    path: npz if it ends in ``.npz``, else HDF5, which stores metadata as attributes; ndim: number of axes of the image
    without channels. The image's key may be ``img``. Call this inside ``reading``. Raises DataError for a missing key,
    for an array that is not numeric, is too large or is stored in another file, and for invalid metadata.
    """
    path, wanted = Path(path), ("image", "label") if labelled else ("image",)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            keys = _array_keys(path, found, wanted) | {key: key for key in FACTS if key in found}
            fields = {name: _read_member(path, archive, key) for name, key in keys.items()}
    else:
        with h5py.File(path, "r", locking=False) as file:  # some network disks have no locks, and files appear whole
            keys = _array_keys(path, list(file), wanted)
            fields = {name: _read_dataset(path, file, key) for name, key in keys.items()}
            fields |= {key: file.attrs[key] for key in FACTS if key in file.attrs}
    arrays = {name: fields[name] for name in wanted}
    return arrays | {"image": _checked_image(path, arrays["image"], ndim)} | _checked_facts(path, fields)


def _array_keys(path: Path, found: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """Return the key in the file of each wanted array; raises DataError if one is missing."""
    image = next((key for key in ("image", "img") if key in found), None)  # keys of TransUNet and of MT-UNet
    if image is None or not {*wanted} - {"image"} <= {*found}:
        raise DataError(
            f"{path}: has no '{'label' if image else 'image'}', only {brief(', '.join(sorted(found))) or 'nothing'}; "
            f"expected 'image' (or 'img') and 'label'; {PREPARE}"
        )
    return {key: image if key == "image" else key for key in wanted}


def _read_member(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    info = archive.getinfo(f"{key}.npy")
    check_declared(path, key, (info.file_size // 4,), np.dtype(np.float32))
    content = io.BytesIO(archive.read(info))  # read to the end, because zipfile checks the checksum there
    array = np.lib.format.read_array(content, allow_pickle=False)
    if key not in FACTS:
        check_declared(path, key, array.shape, array.dtype)
    return array


def _read_dataset(path: Path, file: h5py.File, key: str) -> np.ndarray:
    linked = not isinstance(file.get(key, getlink=True), h5py.HardLink)
    dataset = None if linked else file[key]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise DataError(f"{path}: '{key}' is a link, a group or in another file; expected an array; {PREPARE}")
    check_declared(path, key, dataset.shape, dataset.dtype)
    if dataset.size and dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        raise DataError(f"{path}: parts of '{key}' were never written, and would be read as 0; {PREPARE}")
    return dataset[()]


def check_declared(
    path: str | Path, key: str, shape: tuple[int, ...] | None, dtype: np.dtype, remedy: str = PREPARE
) -> None:
    """Raise DataError unless an array of this shape and type is numeric and takes at most ``MAX_BYTES``."""
    if shape is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(f"{path}: '{key}' holds {brief(dtype)}; expected numbers; {remedy}")
    size = math.prod(shape) * max(dtype.itemsize, 4)
    if size > MAX_BYTES or min(shape, default=0) < 0:
        raise DataError(
            f"{path}: '{key}' declares shape {brief(tuple(shape))}, {size / 2**30:.1f} GiB; expected at most "
            f"{MAX_BYTES / 2**30:.0f} GiB; {remedy}"
        )


def _checked_image(path: str | Path, image: np.ndarray, ndim: int) -> np.ndarray:
    """Return the image as contiguous float32 with ``ndim`` axes, and a last axis for channels if it has several.

    Raises DataError for another number of axes, an axis of length 0, and values that are NaN or infinite.
    """
    if image.ndim == ndim + 1 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim not in (ndim, ndim + 1) or 0 in image.shape:
        expected = {2: "(H, W) or (H, W, channels)", 3: "(slices, H, W) or (slices, H, W, channels)"}[ndim]
        raise DataError(f"{path}: the image has shape {image.shape}; expected {expected}; {PREPARE}")
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, np.float32)
    finite = np.isfinite(image)
    if not finite.all():
        count = image.size - int(finite.sum())
        raise DataError(f"{path}: the image is NaN or infinite in {counted(count, 'value')}; {PREPARE}")
    return image


def checked_label(
    path: str | Path, label: np.ndarray, shape: tuple[int, ...], num_classes: int | None = None, largest: int = 255
) -> np.ndarray:
    """Return the label as contiguous class indices, uint8; raises DataError for another shape and for invalid values.

    num_classes: number of classes, background included; None accepts every index up to ``largest``. If an index is
    above 255, the result is uint16.
    """
    if label.shape != shape:
        raise DataError(f"{path}: the label has shape {label.shape}; expected {shape}, the image's shape; {PREPARE}")
    if label.dtype.kind == "f" and not (np.isfinite(label).all() and np.array_equal(label, np.rint(label))):
        raise DataError(f"{path}: the label holds values that are not whole numbers; {PREPARE}")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > largest:
        raise DataError(f"{path}: label ids run from {low} to {high}; expected 0 to {largest}; {PREPARE}")
    if num_classes is not None and high >= num_classes:
        values, remedy = np.unique(label), f"correct the labels, or train with --num_classes {high + 1}"
        if high > max(15, 4 * len(values)):  # for example 0, 85, 170 and 255: grey values, not indices
            remedy = f"its values are {brief(', '.join(map(str, values)), 60)}; store 0, 1, 2, ... instead"
        last = num_classes - 1
        raise DataError(f"{path}: label id {high} with {num_classes} classes; expected ids from 0 to {last}: {remedy}")
    return np.ascontiguousarray(label, np.uint8 if high < 256 else np.uint16)


def _words(value: object) -> tuple[str, ...]:
    return tuple(word.decode() if isinstance(word, bytes) else word for word in np.atleast_1d(value).tolist())


def is_class_name(word: str) -> bool:
    """Return whether a class may have this name: it needs 1 to 100 printable characters."""
    return word.isprintable() and 0 < len(word) <= 100


FACTS = {
    "class_names": (_words, lambda words: len(words) <= 255 and all(map(is_class_name, words)), "a list of words"),
    "spacing": (
        lambda value: tuple(np.asarray(value, np.float64).tolist()),
        lambda sides: len(sides) == 3 and LENGTHS[0] <= min(sides) <= max(sides) <= LENGTHS[1],
        "three lengths in mm",
    ),
    "affine": (
        np.float64, lambda matrix: matrix.shape == (4, 4) and is_affine(matrix), "an invertible 4 x 4 matrix"
    ),
    "orientation": (lambda value: "".join(_words(value)), is_orientation, "three letters like RAS"),
    "stored_type": (
        lambda value: np.dtype("".join(_words(value))).name, lambda name: np.dtype(name).kind in "iuf",
        "a number type like int16",
    ),
}  # fmt: skip
"""Metadata that a file may hold in addition to its arrays: how each is converted and checked, and the expected form."""


def _checked_facts(path: str | Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return a file's metadata (``FACTS``) as arguments of ``Volume``; raises DataError for an invalid value."""
    facts = {}
    for key in FACTS.keys() & fields.keys():
        convert, fits, expected = FACTS[key]
        try:
            facts[key] = convert(fields[key])
            fit = fits(facts[key])
        except (AttributeError, TypeError, ValueError):
            fit = False
        if not fit:
            raise DataError(f"{path}: {key} is {brief(fields[key])}; expected {expected}; {PREPARE}")
    if {"spacing", "affine"} <= facts.keys():
        sides = np.linalg.norm(facts["affine"][:3, :3], axis=0)[::-1]
        if not np.allclose(sides, facts["spacing"], rtol=0.01):
            raise DataError(
                f"{path}: its spacing is {facts['spacing']} mm, but its affine gives {tuple(sides.tolist())} mm "
                f"(slices, rows, columns); {PREPARE}"
            )
    return facts


@dataclass(frozen=True)
class LabelOrder:
    """The organ that each label id of a file means, for data sets whose public files use more than one order.

    name: value of ``--label_order``; file_classes: classes of ids 1, 2, ... in a file; class_names: classes of our ids
    1, 2, ... A class of the file that is not in ``class_names`` becomes background.
    """

    name: str
    file_classes: tuple[str, ...]
    class_names: tuple[str, ...]

    def apply(self, path: str | Path, label: np.ndarray, names: tuple[str, ...] = ()) -> np.ndarray:
        """Return a file's label, uint8, with our ids.

        path: for messages; names: the class names that the file itself holds. Raises DataError for an id that this
        order does not have, and for a file whose class names differ from ``file_classes``.
        """
        high = int(label.max())
        found = f"holds label id {high}" if high > len(self.file_classes) else ""
        if names and names != self.file_classes:
            found = f"names its classes {brief(', '.join(names))}"
        if found:
            order = ", ".join(f"{index} {name}" for index, name in enumerate(self.file_classes, 1))
            raise DataError(
                f"{path}: {found}, but --label_order {self.name} means {order}: give the order of this file, or "
                "use train_acdc.py to train on other organs"
            )
        ours = {name: index for index, name in enumerate(self.class_names, 1)}
        return np.array([0, *(ours.get(name, 0) for name in self.file_classes)], np.uint8)[label]
