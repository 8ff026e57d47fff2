"""Volumes and slices: what they are in memory and on disk.

On disk a volume is HDF5 (``<name>.npy.h5``) and a slice is npz (``<name>_sliceZZZ.npz``), both with ``image`` and
``label`` as TransUNet's family has them, and beside them ``class_names``, ``spacing`` and, for a volume, ``affine``.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from datasets.errors import DataError
from datasets.resize import resize_cubic, resize_nearest
from datasets.storage import checked_class_names, checked_geometry, checked_image, checked_label, read_fields
from utils.files import atomic_write

ENDINGS = (".npy.h5", ".h5", ".npz")
"""Endings of the files that are data, longest first."""


def data_name(path: str | Path) -> str:
    """Return a data file's name without its ending."""
    name = Path(path).name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


@dataclass
class Volume:
    """One scan with its label, axes (z, y, x).

    image: float32 (D, H, W); label: uint8 (D, H, W) or None; spacing: (z, y, x) in mm or None; affine: float64 (4, 4),
    voxel index (x, y, z) to mm in NIfTI's right-anterior-superior space, or None; class_names: without background.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def network_input(self, img_size: int) -> np.ndarray:
        """Return the slices at the network's size, cubic splines: float32 (D, 1, S, S)."""
        return resize_cubic(self.image, (img_size, img_size))[:, None]

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        """Return a prediction (D, S, S) at the volume's own size, nearest neighbour: (D, H, W), same type."""
        return resize_nearest(prediction, self.image.shape[1:])


def read_volume(path: str | Path, num_classes: int | None = None) -> Volume:
    """Read and check one volume, HDF5 or npz.

    num_classes (with background) bounds the label ids where given. Raises DataError naming the file.
    """
    fields = read_fields(path)
    image, label = _checked_pair(path, fields, 3, num_classes)
    spacing, affine = checked_geometry(path, fields.get("spacing"), fields.get("affine"))
    names = checked_class_names(path, fields.get("class_names", ()))
    return Volume(data_name(path), image, label, spacing, affine, names)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a Volume with its label to HDF5, compressed, whole or not at all."""
    # Through memory: on a full disk HDF5's own writing prints tracebacks and may crash the interpreter.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for key, array in (("image", volume.image), ("label", volume.label)):
            file.create_dataset(key, data=array, compression="gzip", shuffle=True, chunks=(1, *array.shape[1:]))
        if volume.class_names:
            file.attrs["class_names"] = list(volume.class_names)
        if volume.spacing is not None:
            file.attrs["spacing"] = np.asarray(volume.spacing, dtype=np.float64)
        if volume.affine is not None:
            file.attrs["affine"] = np.asarray(volume.affine, dtype=np.float64)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_slice(path: str | Path, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read and check one slice: returns (image float32 (H, W), label uint8 (H, W)), or raises DataError."""
    return _checked_pair(path, read_fields(path), 2, num_classes)


def write_slice(path: str | Path, volume: Volume, index: int) -> None:
    """Write slice ``index`` of a Volume with its label to npz, whole or not at all."""
    facts = {} if volume.spacing is None else {"spacing": np.asarray(volume.spacing, dtype=np.float64)}
    if volume.class_names:
        facts["class_names"] = np.array(volume.class_names, dtype=np.str_)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, image=volume.image[index], label=volume.label[index], **facts)


def stack_slices(name: str, paths: Sequence[Path], num_classes: int | None = None) -> Volume:
    """Read the slices of one volume in the order given and stack them to a Volume; raises DataError."""
    pairs = [read_slice(path, num_classes) for path in paths]
    first = pairs[0][0].shape
    for path, (image, _) in zip(paths, pairs, strict=True):
        if image.shape != first:
            raise DataError(
                f"{path}: shape {image.shape}, but {paths[0].name} of the same volume has {first}; "
                "prepare the data again or replace the file"
            )
    images, labels = zip(*pairs, strict=True)
    return Volume(name, np.stack(images), np.stack(labels))


def _checked_pair(path: str | Path, fields: dict, ndim: int, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    image = checked_image(path, fields["image"], ndim)
    return image, checked_label(path, fields["label"], image.shape, num_classes)
