"""Volumes and slices in memory, on disk and as data sets.

On disk a volume is HDF5 (``<name>.npy.h5``) and a slice is npz (``<name>_sliceZZZ.npz``). Both hold ``image`` and
``label``, as in TransUNet's family, and ``class_names`` and ``spacing``. A volume also has ``affine``, ``orientation``
and ``stored_type``.
"""

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import torch

from datasets.errors import DataError
from datasets.files import atomic_write
from datasets.lists import data_name, list_path, natural_key, patient_of, select_files
from datasets.preprocessing import nifti_image
from datasets.storage import (
    LabelOrder,
    checked_class_names,
    checked_geometry,
    checked_image,
    checked_label,
    checked_origin,
    memory_bounded,
    read_fields,
)
from datasets.training_set import TrainingSet
from datasets.transforms import augment, resize_cubic, resize_nearest

COMPRESSION = 1
"""zlib's level for prepared files: the fastest."""

_SLICE = re.compile(r"(?P<volume>.+)_slice(?P<phase>[A-Za-z]*)_?[0-9]+")


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


class VolumeDataset(Sequence[Volume]):
    """The volumes that a list names, each read and checked when it is asked for.

    volume_path: folder of ``.npy.h5``, ``.h5`` or ``.npz`` volumes, or of slices, which are stacked to their volume
    (MT-UNet's validation part has slices only); a folder of the split's name in it is used in its place. num_classes
    counts the background; label_order turns the ids of other people's files into ours; only: patients of the list, or
    None for all. ``[i]`` gives a Volume; ``names`` are the volumes' names, ``source`` the list. Raises DataError
    for a bad list at once, for a bad file when it is read.
    """

    def __init__(
        self,
        volume_path: str | Path,
        list_dir: str | Path,
        split: str,
        num_classes: int,
        label_order: LabelOrder | None = None,
        only: Sequence[str] | None = None,
    ):
        self.num_classes = num_classes
        self.label_order = label_order
        self.source = list_path(list_dir, split)
        self.files = _group_by_volume(select_files(list_dir, split, volume_path, only=only))
        self.names = list(self.files)

    @property
    def patients(self) -> set[str]:
        """Whose volumes they are."""
        return {patient_of(name) for name in self.names}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Volume:
        name = self.names[index]
        files = self.files[name]
        if _SLICE.fullmatch(data_name(files[0])):
            return stack_slices(name, files, self.num_classes, self.label_order)
        return read_volume(files[0], self.num_classes, self.label_order)


def _group_by_volume(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each volume by its name, in the order of the list: one file, or all its slices in order."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        found = _SLICE.fullmatch(data_name(path))
        name = "_volume_".join(filter(None, found.group("volume", "phase"))) if found else data_name(path)
        files.setdefault(name, []).append(path)
    for name, members in files.items():
        if len(members) > 1 and not all(_SLICE.fullmatch(data_name(path)) for path in members):
            raise DataError(f"{members[0]}: {members[1]} is the same volume {name}; keep one of them")
        members.sort(key=lambda path: natural_key(path.name))
    return files


class SliceDataset(TrainingSet):
    """The slices (npz) that a list names, augmented at their own size and resized to the network's.

    root_path: their folder; a folder of the split's name in it is used in its place. num_classes counts the
    background; label_order turns the ids of other people's files into ours; without: patients of the list to leave out.
    ``[i]`` gives ``image`` float32 (1, S, S), cubic, ``label`` int64 (S, S), nearest, and ``name``. Raises DataError
    for a bad list at once, for a bad file when it is read.
    """

    def __init__(
        self,
        root_path: str | Path,
        list_dir: str | Path,
        split: str,
        num_classes: int,
        img_size: int,
        augment: bool = False,
        seed: int = 2222,
        label_order: LabelOrder | None = None,
        without: Sequence[str] = (),
    ):
        super().__init__(seed)
        self.source = list_path(list_dir, split)
        self.files = select_files(list_dir, split, root_path, endings=(".npz",), without=without)
        self.num_classes = num_classes
        self.label_order = label_order
        self.img_size = img_size
        self.augment = augment

    @property
    def patients(self) -> set[str]:
        """Whose slices they are."""
        return {patient_of(file.name) for file in self.files}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, float32 (H, W), and the label, uint8 (H, W), of a slice as its file has them."""
        return read_slice(self.files[index], self.num_classes, self.label_order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.stored(index)
        if self.augment:
            image, label = augment(image, label, self.generator(index))
        size = (self.img_size, self.img_size)
        return {
            "image": torch.from_numpy(resize_cubic(image, size))[None],
            "label": torch.from_numpy(resize_nearest(label, size)).long(),
            "name": data_name(self.files[index]),
        }
