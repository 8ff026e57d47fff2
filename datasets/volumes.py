"""Volumes and slices in memory, on disk and as data sets.

On disk a volume is HDF5 (``<name>.npy.h5``) and a slice is npz (``<name>_sliceZZZ.npz``). Both hold ``image`` and
``label``, as for TransUNet and its successors, and ``class_names`` and ``spacing``. A volume also has ``affine``,
``orientation`` and ``stored_type``.
"""

import io
import logging
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from datasets.errors import DataError, brief, counted
from datasets.files import atomic_write
from datasets.lists import data_name, is_slice, list_path, natural_key, select_files, volume_name
from datasets.preprocessing import reorient, upright
from datasets.storage import FACTS, PREPARE, LabelOrder, checked_label, read_fields, reading
from datasets.training_set import TrainingSet
from datasets.transforms import resize_cubic, resize_nearest

logger = logging.getLogger(__name__)

COMPRESSION = 1  # zlib level of prepared files: the fastest


@dataclass
class Volume:
    """One scan with its label; axes are (z, y, x). A ``Picture`` of ``images.py`` is a Volume of one slice.

    image: float32 (D, H, W), of several channels (D, H, W, C); label: uint8 (D, H, W) or None; spacing: (z, y, x) in
    mm or None; affine: float64 (4, 4) from voxel index (x, y, z) to mm in NIfTI's right-anterior-superior space, or
    None; class_names: without background. orientation and stored_type describe the original file: the directions of its
    x, y and z axes (``RAS``; None: the same as here), and the number type of its label, or of its image if it has no
    label (None: unknown).
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
        """Return all slices, or a part of them, resized by cubic splines for the network: float32 (n, C, S, S)."""
        return resize_cubic(_channels_first(self.image[part], self.image.ndim == 4), (img_size, img_size))

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        """Return a prediction (D, S, S) resized to the volume by nearest neighbour: (D, H, W), same type."""
        return resize_nearest(prediction, self.image.shape[1:3])

    def plane(self, z: int) -> np.ndarray:
        """Return slice ``z`` for figures, float32 (H, W); of several channels, return the first one."""
        return self.image[z][..., 0] if self.image.ndim == 4 else self.image[z]

    def to_nifti(self, array: np.ndarray):
        """Return a nibabel image of an array (D, H, W) of this volume, with axes as in the original file.

        Class indices (uint8) get the number type of the original file if that is an integer type that can hold them. If
        the volume has no affine, a diagonal one is made from the spacing, or from 1 mm.
        """
        import nibabel

        stored = np.dtype(self.stored_type or np.float32)
        if array.dtype == np.uint8 and stored.kind in "iu" and array.max(initial=0) <= np.iinfo(stored).max:
            array = array.astype(stored)
        affine = np.diag([*(self.spacing or (1.0, 1.0, 1.0))[::-1], 1.0]) if self.affine is None else self.affine
        if self.orientation is not None:
            array, affine = reorient(array, affine, self.orientation)
        image = nibabel.Nifti1Image(np.asarray(array).T, affine, dtype=array.dtype)
        image.set_sform(affine, code=1)  # both forms, because some programs read only one of them
        image.set_qform(upright(affine), code=1)
        image.header.set_xyzt_units("mm")
        return image


def _channels_first(image: np.ndarray, several: bool) -> np.ndarray:
    """Return images (..., H, W), or (..., H, W, C) if they have several channels, as (..., C, H, W)."""
    return np.moveaxis(image, -1, -3) if several else np.expand_dims(image, -3)


def read_volume(
    path: str | Path, num_classes: int | None = None, label_order: LabelOrder | None = None, ndim: int = 3,
    class_names: tuple[str, ...] | None = None, labelled: bool = True,
) -> Volume:  # fmt: skip
    """Read and check one volume (HDF5 or npz), or one slice with arrays (H, W) if ``ndim`` is 2.

    num_classes, background included, limits the label ids; label_order translates a file's ids to ours; class_names:
    if the file names its classes, it must use these names; labelled: if False, read only the image. Raises DataError,
    which names the file.
    """
    with reading(path, "npz or HDF5 file"):
        facts = read_fields(path, ndim, labelled)
        image, label = facts.pop("image"), facts.pop("label", None)
        named = facts.get("class_names", ())
        if label is not None:
            label = checked_label(path, label, image.shape[:ndim], None if label_order else num_classes)
        if label_order:
            label = label_order.apply(path, label, named)
            facts["class_names"] = named = label_order.class_names
    if named and num_classes and len(named) != num_classes - 1:
        raise DataError(
            f"{path}: names {counted(len(named), 'class')} ({brief(', '.join(named))}); expected {num_classes - 1}: "
            f"train and check with --num_classes {len(named) + 1}, background included"
        )
    if named and class_names and named != class_names:
        raise DataError(
            f"{path}: names its classes {', '.join(named)}; expected {', '.join(class_names)}, as in the other files, "
            "--class_names or the checkpoint; correct one of them"
        )
    return Volume(data_name(path), image, label, **facts)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a Volume with its label to compressed HDF5; the file appears whole or not at all."""
    # Write to memory first: on a full disk, HDF5 itself prints tracebacks and may crash the interpreter.
    content = io.BytesIO()
    packing = dict(compression="gzip", compression_opts=COMPRESSION, shuffle=True)
    with h5py.File(content, "w", libver=("v110", "v110")) as file:  # this format has checksums for all but the arrays
        for key in ("image", "label"):
            data = getattr(volume, key)
            file.create_dataset(key, data=data, chunks=(1, *data.shape[1:]), **packing)
        for key in FACTS:
            value = getattr(volume, key)
            if value is not None and len(value):
                # Texts of fixed length: HDF5 keeps others in its heap, and a damaged heap may make it loop for ever.
                is_text = key in ("class_names", "orientation", "stored_type")
                file.attrs[key] = np.char.encode(value, "utf-8") if is_text else value
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def write_slice(path: str | Path, volume: Volume, index: int) -> None:
    """Write slice ``index`` of a Volume with its label to npz; the file appears whole or not at all."""
    arrays = {"image": volume.image[index], "label": volume.label[index]}
    arrays |= {} if volume.spacing is None else {"spacing": np.asarray(volume.spacing, np.float64)}
    arrays |= {"class_names": np.array(volume.class_names, np.str_)} if volume.class_names else {}
    # np.savez_compressed packs at zlib's level 6, which takes six times as long and saves a tenth of the bytes.
    packing = dict(compression=zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION)
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", **packing) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


class VolumeDataset(Sequence[Volume]):
    """The volumes that a list names; each is read and checked when it is indexed.

    volume_path: folder of ``.npy.h5``, ``.h5`` or ``.npz`` volumes, or of slices, which are stacked to volumes
    (MT-UNet's validation data are slices); a folder inside it with the split's name takes precedence. num_classes
    counts the background; label_order translates a file's ids to ours; only: names in the list to keep, or None for
    all. ``[i]`` returns a Volume; ``names`` are the volumes' names, ``source`` the list. A file that names its classes
    must use ``class_names`` (None: any). The constructor raises DataError for a bad list, indexing for a bad file.
    """

    def __init__(
        self, volume_path: str | Path, list_dir: str | Path, split: str, num_classes: int,
        label_order: LabelOrder | None = None, only: Sequence[str] | None = None,
    ):  # fmt: skip
        self.num_classes, self.label_order, self.class_names = num_classes, label_order, None
        self.source = list_path(list_dir, split)
        self.files = group_by_volume(select_files(list_dir, split, volume_path, only=only))
        self.names = list(self.files)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Volume:
        return read_parts(self.files[self.names[index]], self.num_classes, self.label_order, self.class_names)

    open = __getitem__  # like the other three data sets: return a case as stored


def read_parts(
    files: Sequence[Path], num_classes: int, label_order: LabelOrder | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Volume:  # fmt: skip
    """Read a volume from its file, or from the files of all its slices, as ``read_volume`` does."""
    ndim = 2 if is_slice(files[0]) else 3
    parts = [read_volume(file, num_classes, label_order, ndim, class_names) for file in files]
    if ndim == 3:
        return parts[0]
    first = parts[0].image.shape
    for file, part in zip(files, parts, strict=True):
        if part.image.shape != first:
            raise DataError(f"{file}: has shape {part.image.shape}, but {files[0].name} has {first}; {PREPARE}")
    image, label = (np.stack([getattr(part, key) for part in parts]) for key in ("image", "label"))
    return Volume(volume_name(files[0]), image, label, parts[0].spacing, class_names=parts[0].class_names)


def group_by_volume(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the files of each volume by its name, in the order given: one file, or all its slices in order."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(volume_name(path), []).append(path)
    for name, members in files.items():
        if len(members) > 1 and not all(map(is_slice, members)):
            raise DataError(f"{members[0]}: {members[1]} is the same volume {name}; keep one of them")
        members.sort(key=lambda path: natural_key(path.name))
        numbers = [natural_key(data_name(path))[-2] for path in members if is_slice(path)]
        missing = [number for number in range(numbers[0], numbers[-1]) if number not in numbers] if numbers else []
        if missing:
            logger.warning(
                "%s: slice %d of %s is missing (%d in all), so distances across the gap are too short; add the slice "
                "to the folder, and to the list if it names slices",
                members[0].parent, missing[0], name, len(missing),
            )  # fmt: skip
    return files


class SliceDataset(TrainingSet):
    """The slices (npz) that a list names, augmented at their own size and then resized for the network.

    root_path: folder of the slices; a folder inside it with the split's name takes precedence. num_classes counts the
    background; label_order translates a file's ids to ours; without: names in the list to leave out. ``names`` are the
    volumes' names; ``source`` and ``class_names`` are as in VolumeDataset. The constructor raises DataError for a bad
    list, and indexing raises it for a bad file.
    """

    def __init__(
        self, root_path: str | Path, list_dir: str | Path, split: str, num_classes: int, img_size: int,
        augment: bool = False, seed: int = 2222, label_order: LabelOrder | None = None, without: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__(seed, img_size, augment)
        self.source = list_path(list_dir, split)
        self.files = select_files(list_dir, split, root_path, endings=(".npz",), without=without)
        self.samples = [data_name(file) for file in self.files]
        self.names = list(dict.fromkeys(map(volume_name, self.files)))
        self.num_classes, self.label_order, self.class_names = num_classes, label_order, None

    def open(self, index: int) -> Volume:
        """Return a slice as stored: a Volume whose image and label have the shape (H, W)."""
        return read_volume(self.files[index], self.num_classes, self.label_order, 2, self.class_names)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the image of ``open``, float32 (H, W) or (H, W, C), and its label, uint8 (H, W)."""
        single = self.open(index)
        return single.image, single.label

    def fit(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice resized by cubic splines, and its label resized by nearest neighbour."""
        size = (self.img_size, self.img_size)
        return resize_cubic(_channels_first(image, image.ndim == 3), size), resize_nearest(label, size)
