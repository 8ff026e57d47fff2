"""Volumes and slices: what they are in memory and on disk.

On disk a volume is HDF5 (``<name>.npy.h5``) and a slice is npz (``<name>_sliceZZZ.npz``), both with ``image`` and
``label`` as TransUNet's family has them, and beside them ``class_names``, ``spacing`` and, for a volume, ``affine``,
``orientation`` and ``stored_type``.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from datasets.errors import DataError
from datasets.files import atomic_write
from datasets.label_order import LabelOrder
from datasets.orientation import nifti_image
from datasets.storage import (
    checked_class_names,
    checked_geometry,
    checked_image,
    checked_label,
    checked_origin,
    memory_bounded,
    read_fields,
)
from datasets.transforms import resize_cubic, resize_nearest

COMPRESSION = 1
"""zlib's level for prepared files: the fastest."""

ENDINGS = (".npy.h5", ".h5", ".npz")
"""Endings of the files that are data, longest first."""


def data_name(path: str | Path) -> str:
    """Return a data file's name without its ending."""
    name = Path(path).name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


@dataclass
class Volume:
    """One scan with its label, axes (z, y, x).

    image: float32 (D, H, W), or a ScanImage that gives it slice by slice; label: uint8 (D, H, W) or None; spacing:
    (z, y, x) in mm or None; affine: float64 (4, 4), voxel index (x, y, z) to mm in NIfTI's right-anterior-superior
    space, or None; class_names: without background. orientation and stored_type say how the file that the volume came
    from had it: which way x, y and z ran (``RAS``; None: as here) and the number type of its label, or of its image
    where it has none (None: not known).
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    orientation: str | None = None
    stored_type: str | None = None

    planar: ClassVar[bool] = False

    def network_input(self, img_size: int, part: slice = slice(None)) -> np.ndarray:
        """Return slices (all, or a part) at the network's size, cubic splines: float32 (n, 1, S, S)."""
        return resize_cubic(self.image[part], (img_size, img_size))[:, None]

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        """Return a prediction (D, S, S) at the volume's own size, nearest neighbour: (D, H, W), same type."""
        return resize_nearest(prediction, self.image.shape[1:])

    def to_nifti(self, array: np.ndarray):
        """Return a nibabel image of an array (D, H, W) of this volume, its axes as the volume's file had them.

        Class indices (uint8) get the number type of the file where that is one of integers.
        """
        if array.dtype == np.uint8 and self.stored_type and np.dtype(self.stored_type).kind in "iu":
            array = array.astype(self.stored_type)
        return nifti_image(array, self.affine, self.spacing, self.orientation)


@memory_bounded
def read_volume(path: str | Path, num_classes: int | None = None, label_order: LabelOrder | None = None) -> Volume:
    """Read and check one volume, HDF5 or npz.

    num_classes (with background) bounds the label ids where given; label_order turns a file's ids into ours. Raises
    DataError naming the file.
    """
    fields = read_fields(path)
    image, label, names = _checked_pair(path, fields, 3, num_classes, label_order)
    spacing, affine = checked_geometry(path, fields.get("spacing"), fields.get("affine"))
    orientation, stored_type = checked_origin(path, fields.get("orientation"), fields.get("stored_type"))
    return Volume(data_name(path), image, label, spacing, affine, names, orientation, stored_type)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a Volume with its label to HDF5, compressed, whole or not at all."""
    # Through memory: on a full disk HDF5's own writing prints tracebacks and may crash the interpreter.
    content, chunks = io.BytesIO(), (1, *volume.image.shape[1:])
    with h5py.File(content, "w") as file:
        for key, array in (("image", volume.image), ("label", volume.label)):
            file.create_dataset(
                key, data=array, compression="gzip", compression_opts=COMPRESSION, shuffle=True, chunks=chunks
            )
        if volume.class_names:
            file.attrs["class_names"] = list(volume.class_names)
        if volume.spacing is not None:
            file.attrs["spacing"] = np.asarray(volume.spacing, dtype=np.float64)
        if volume.affine is not None:
            file.attrs["affine"] = np.asarray(volume.affine, dtype=np.float64)
        for key, text in (("orientation", volume.orientation), ("stored_type", volume.stored_type)):
            if text is not None:
                file.attrs[key] = text
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


@memory_bounded
def read_slice(
    path: str | Path, num_classes: int | None = None, label_order: LabelOrder | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one slice: returns (image float32 (H, W), label uint8 (H, W)), or raises DataError.

    num_classes and label_order: as for ``read_volume``.
    """
    return _checked_pair(path, read_fields(path), 2, num_classes, label_order)[:2]


def write_slice(path: str | Path, volume: Volume, index: int) -> None:
    """Write slice ``index`` of a Volume with its label to npz, whole or not at all."""
    facts = {} if volume.spacing is None else {"spacing": np.asarray(volume.spacing, dtype=np.float64)}
    if volume.class_names:
        facts["class_names"] = np.array(volume.class_names, dtype=np.str_)
    arrays = {"image": volume.image[index], "label": volume.label[index], **facts}
    # numpy's own compressed form, but at zlib's level 6, takes four times as long and saves a tenth of the room.
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def stack_slices(
    name: str, paths: Sequence[Path], num_classes: int | None = None, label_order: LabelOrder | None = None
) -> Volume:
    """Read the slices of one volume in the order given and stack them to a Volume; raises DataError."""
    pairs = [read_slice(path, num_classes, label_order) for path in paths]
    first = pairs[0][0].shape
    for path, (image, _) in zip(paths, pairs, strict=True):
        if image.shape != first:
            raise DataError(
                f"{path}: shape {image.shape}, but {paths[0].name} of the same volume has {first}; "
                "prepare the data again or replace the file"
            )
    images, labels = zip(*pairs, strict=True)
    return Volume(name, np.stack(images), np.stack(labels))


def _checked_pair(
    path: str | Path, fields: dict, ndim: int, num_classes: int | None, order: LabelOrder | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return (image, label, class names) of a file."""
    image = checked_image(path, fields["image"], ndim)
    names = checked_class_names(path, fields.get("class_names", ()))
    if order is not None:
        return image, order.apply(path, fields["label"], image.shape, names), order.class_names
    return image, checked_label(path, fields["label"], image.shape, num_classes), names
