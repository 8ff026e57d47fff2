"""Reading arrays from HDF5 and npz files that may be damaged, hostile or of another kind.

Nothing is unpickled, and no array is read before its declared size has been compared with ``MAX_BYTES``.
"""

import functools
import io
import math
import mmap
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5s, h5t, h5z

from datasets.errors import DataError, brief
from datasets.preprocessing import LENGTHS, is_affine, is_orientation

MAX_BYTES = 4 * 2**30
"""Largest array that is read, in bytes, a number counted with at least 4: it may become a float32 when it is worked on.
About eight times a float32 CT volume of 512 x 512 x 512."""

MAX_INFLATION = 1032
"""Most bytes that one byte of a deflate stream (zip, gzip) can stand for."""

IMAGE_KEYS = ("image", "img")
"""Names of the image in a file: TransUNet's and MT-UNet's."""

TEXTS = ("class_names", "orientation", "stored_type")
FACTS = (*TEXTS, "spacing", "affine")
"""What a file may say beside its arrays."""

_FACT_BYTES = 2**16  # far more than any of the facts takes
_HEADER_BYTES = 2**14  # numpy writes 128 and reads no more than 10,000
_HEAP = b"GCOL\1\0\0\0"  # how HDF5's global heap begins

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
    except (DataError, MemoryError):
        raise
    except Exception as error:  # zipfile, numpy's parser of headers and HDF5 each have their own
        raise DataError(
            f"{path}: not a readable {kind} file, truncated or of another kind ({brief(error)}); {_PREPARE}"
        ) from error


def memory_bounded(read: Callable[..., Any]) -> Callable[..., Any]:
    """Let a reader, whose first argument is the path, raise DataError where a file needs more memory than there is."""

    @functools.wraps(read)
    def bounded(path: str | Path, *args, **kwargs):
        try:
            return read(path, *args, **kwargs)
        except MemoryError as error:
            raise DataError(
                f"{path}: does not fit into the memory that is free; close other programs, or crop or replace the file"
            ) from error

    return bounded


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    _check_heaps(path)
    with h5py.File(path, "r") as file:
        fields = {}
        for name, key in _array_keys(path, file.keys()).items():
            if not isinstance(file.get(key, getlink=True), h5py.HardLink):
                raise DataError(f"{path}: '{key}' is a link, perhaps to another file; {_PREPARE}")
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(f"{path}: '{key}' is a group, an array was expected; {_PREPARE}")
            check_declared(path, key, dataset.shape, dataset.dtype)
            fields[name] = _read_array(path, key, dataset)
        for key in FACTS:
            if key in file.attrs:
                fact = file.attrs.get_id(key)
                is_empty = fact.get_space().get_simple_extent_type() == h5s.NULL
                _check_fact(path, key, None if is_empty else fact.shape, fact.dtype)
                fields[key] = file.attrs[key]
    return fields


def _check_heaps(path: Path) -> None:
    """Raise ValueError for a damaged heap, where an HDF5 file keeps its texts: HDF5 may go round in it for ever."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            end, at = start + int.from_bytes(content[start + 8 : start + 16], "little"), start + 16
            if end > len(content):
                raise ValueError("a heap that is longer than the file")
            while end - at >= 16:  # a part's head: number, references, and at 8 its size; number 0 is what is left
                size = int.from_bytes(content[at + 8 : at + 16], "little")
                step = 16 + -(-size // 8) * 8 if any(content[at : at + 2]) else size
                if not 16 <= step <= end - at:
                    raise ValueError("a heap whose parts do not fill it")
                at += step
            start = content.find(_HEAP, start + 8)


def _read_array(path: Path, key: str, dataset: h5py.Dataset) -> np.ndarray:
    """Read an HDF5 array that is neither in other files nor packed otherwise than by gzip or lzf, shuffled or not."""
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if layout == h5d.VIRTUAL or (layout == h5d.CONTIGUOUS and properties.get_external_count()):
        raise DataError(f"{path}: the numbers of '{key}' lie in another file; {_PREPARE}")
    if layout != h5d.CHUNKED:
        return dataset[()]
    stages = [properties.get_filter(index) for index in range(properties.get_nfilters())]
    filters = [stage[0] for stage in stages]
    by_hdf5 = {h5z.FILTER_LZF, h5z.FILTER_FLETCHER32} & set(filters)  # one has no other reader, one is a checksum
    own = [kind for kind in filters if kind not in by_hdf5]
    if own not in ([], [h5z.FILTER_SHUFFLE], [h5z.FILTER_DEFLATE], [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]):
        raise DataError(f"{path}: '{key}' is packed by HDF5 filters {filters}; gzip or lzf was expected; {_PREPARE}")
    check_declared(path, f"a chunk of {key}", dataset.chunks, dataset.dtype)
    if h5t.py_create(dataset.dtype, logical=True) != dataset.id.get_type():
        raise ValueError(f"'{key}' is of numbers that are no {dataset.dtype}")
    if any(kind == h5z.FILTER_SHUFFLE and values[:1] != (dataset.dtype.itemsize,) for kind, _, values, _ in stages):
        raise ValueError(f"'{key}' is shuffled by another length than that of its numbers")
    if by_hdf5:
        return dataset[()]
    array = np.full(dataset.shape, dataset.fillvalue, dataset.dtype)
    size, chunks = path.stat().st_size, []
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        start = chunk.chunk_offset
        if chunk.size > size or any(
            s % c or s >= n for s, c, n in zip(start, dataset.chunks, array.shape, strict=True)
        ):
            raise ValueError(f"a chunk of {chunk.size} bytes at {start} in a file of {size}")
        block = _unpacked_chunk(*dataset.id.read_direct_chunk(start), filters, dataset)
        inside = array[tuple(slice(s, s + c) for s, c in zip(start, dataset.chunks, strict=True))]
        inside[...] = block[tuple(slice(n) for n in inside.shape)]
    return array


def _unpacked_chunk(skipped: int, content: bytes, filters: list[int], dataset: h5py.Dataset) -> np.ndarray:
    """Return a chunk of an HDF5 array from its stored bytes; bit i of ``skipped`` says that filter i was not applied.

    HDF5 itself unpacks whatever comes out, and of a chunk that comes out too short it reads on in memory.
    """
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    applied = {kind for index, kind in enumerate(filters) if not skipped >> index & 1}
    if h5z.FILTER_DEFLATE in applied:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(content, size + 1)
        if not unpacker.eof:
            raise ValueError(f"a chunk that does not end after its {size} bytes")
    if len(content) != size:
        raise ValueError(f"a chunk of {len(content)} bytes, {size} were expected")
    if h5z.FILTER_SHUFFLE in applied:  # the first bytes of all numbers, then the second ones
        content = np.frombuffer(content, np.uint8).reshape(dataset.dtype.itemsize, -1).T.tobytes()
    return np.frombuffer(content, dataset.dtype).reshape(dataset.chunks)


def _check_fact(path: Path, key: str, shape: tuple[int, ...] | None, dtype: np.dtype) -> None:
    """Raise DataError for a fact that is no number and no text, or longer than any of them needs to be."""
    if shape is None or (dtype.kind not in "biufSU" and h5py.check_string_dtype(dtype) is None):
        raise DataError(f"{path}: '{key}' holds {brief(dtype)}, numbers or text were expected; {_PREPARE}")
    if math.prod(shape) * dtype.itemsize > _FACT_BYTES:
        raise DataError(f"{path}: '{key}' declares shape {brief(shape)}, a few words or numbers expected; {_PREPARE}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        keys = _array_keys(path, found)
        keys |= {key: key for key in FACTS if key in found}
        return {name: _read_member(path, archive, key) for name, key in keys.items()}


def _read_member(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Read one array of an npz file, to its last byte: only there zipfile compares the checksum."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"'{key}' is packed by method {info.compress_type}")
    with archive.open(info) as member:
        start = io.BytesIO(member.read(_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"array format {version}")
    shape, _, dtype = read_header[version](start)
    check_declared(path, key, shape, dtype, text_allowed=key in TEXTS)
    if key in FACTS:
        _check_fact(path, key, shape, dtype)
    declared = start.tell() + math.prod(shape) * dtype.itemsize
    if info.file_size != declared or info.file_size > MAX_INFLATION * (info.compress_size + 1):
        raise ValueError(
            f"'{key}' declares shape {shape}, {declared} bytes; the archive has {info.compress_size} bytes of it "
            f"and says {info.file_size}"
        )
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _array_keys(path: Path, found: Iterable[str]) -> dict[str, str]:
    image = next((key for key in IMAGE_KEYS if key in found), None)
    if image is None or "label" not in found:
        missing = "label" if image else "image"
        raise DataError(
            f"{path}: has no '{missing}', only {brief(', '.join(sorted(found))) or 'nothing'}; "
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
    text = text_allowed and dtype.kind == "U"
    if shape is None or not (text or (dtype.kind in "biuf" and dtype.itemsize <= 8)):
        found = "nothing" if shape is None else brief(dtype)
        raise DataError(f"{path}: '{key}' holds {found}, numbers were expected; {remedy}")
    size = math.prod(shape) * max(dtype.itemsize, 4)
    if size > MAX_BYTES or min(shape, default=0) < 0:
        raise DataError(
            f"{path}: '{key}' declares shape {brief(tuple(shape))}, {size / 2**30:.1f} GiB, more than the "
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
    try:
        names = tuple(name.decode() if isinstance(name, bytes) else name for name in np.atleast_1d(names).tolist())
    except ValueError as error:  # bytes or code points that are no text
        raise DataError(f"{path}: class_names holds no text ({brief(error)}); {_PREPARE}") from error
    if not is_names(names):
        raise DataError(f"{path}: class_names holds {brief(names)}, a few words each were expected; {_PREPARE}")
    return names


def is_names(values: Iterable) -> bool:
    """Return whether these can be names of classes: text that can be printed, of at most 100 letters, at most 255."""
    values = list(values)
    fit = (isinstance(v, str) and v.isprintable() and 0 < len(v.strip()) <= len(v) <= 100 for v in values)
    return len(values) <= 255 and all(fit)


def checked_geometry(
    path: str | Path, spacing: np.ndarray | None, affine: np.ndarray | None
) -> tuple[tuple[float, float, float] | None, np.ndarray | None]:
    """Return (spacing, affine) as ((z, y, x) mm, (4, 4) float64), each None where absent, or raise DataError."""
    if spacing is not None:
        spacing = np.asarray(spacing)
        fit = spacing.shape == (3,) and spacing.dtype.kind in "iuf"
        if not (fit and ((spacing >= LENGTHS[0]) & (spacing <= LENGTHS[1])).all()):
            raise DataError(f"{path}: spacing is {brief(spacing)}, three lengths in mm were expected; {_PREPARE}")
        spacing = tuple(float(length) for length in spacing)
    if affine is not None:
        affine = np.asarray(affine)
        if affine.shape != (4, 4) or affine.dtype.kind not in "iuf" or not is_affine(affine.astype(np.float64)):
            raise DataError(
                f"{path}: affine has shape {affine.shape}, 4 x 4 numbers that can be inverted were expected; {_PREPARE}"
            )
        affine = affine.astype(np.float64)
    return spacing, affine


def checked_origin(path: str | Path, orientation: object, stored_type: object) -> tuple[str | None, str | None]:
    """Return (orientation as ``RAS``, number type as ``int16``), each None where absent, or raise DataError."""
    orientation, stored_type = (None if value is None else _text(value) for value in (orientation, stored_type))
    if orientation is not None and not is_orientation(orientation):
        raise DataError(f"{path}: orientation is {orientation}, three letters like RAS were expected; {_PREPARE}")
    if stored_type is not None and not re.fullmatch("u?int(8|16|32|64)|float(16|32|64)", stored_type):
        raise DataError(f"{path}: stored_type is {stored_type}, one like int16 was expected; {_PREPARE}")
    return orientation, stored_type


def _text(value: object) -> str:
    """Return the text that a file has for a fact, or, of anything else, what an error is to quote."""
    try:
        value = value.item() if isinstance(value, np.ndarray) else value
        return brief(value.decode() if isinstance(value, bytes) else value)
    except ValueError:  # several values, or no text
        return brief(value.dtype if isinstance(value, np.ndarray) else repr(value))


@dataclass(frozen=True)
class LabelOrder:
    """The classes of other people's files, and ours.

    name: as the user gives it with ``--label_order``; file_classes: what id 1, 2, ... of a file mean;
    class_names: what they mean to us. Classes that are not ours become background.
    """

    name: str
    file_classes: tuple[str, ...]
    class_names: tuple[str, ...]

    def apply(self, path: str | Path, label: np.ndarray, shape: tuple[int, ...], names: tuple[str, ...]) -> np.ndarray:
        """Return a file's label with our ids, uint8.

        path: for messages; shape: of the image; names: the classes that the file itself names, or none. Raises
        DataError for an id beyond the order's, and for a file that says it has another order.
        """
        if names and names != self.file_classes:
            raise DataError(
                f"{path}: names its classes {brief(', '.join(names))}, but --label_order {self.name} is "
                f"{self.described()}: give the order that the file has"
            )
        try:
            label = checked_label(path, label, shape, len(self.file_classes) + 1)
        except DataError as error:
            raise DataError(f"{error} (ids were taken as --label_order {self.name}, {self.described()})") from error
        return self._ids()[label]

    def described(self) -> str:
        """Return the classes in order, as text."""
        return ", ".join(f"{index} {name}" for index, name in enumerate(self.file_classes, 1))

    def _ids(self) -> np.ndarray:
        """Return our id for each id of a file, background included."""
        ours = {name: index for index, name in enumerate(self.class_names, 1)}
        return np.array([0, *(ours.get(name, 0) for name in self.file_classes)], np.uint8)
