"""A damaged file is refused in one line that names it, or read right; it runs no code and leads out of no folder.

25 files of every kind by default, 400 with ``-m slow``. FUZZ_SEED chooses others.
"""

import gzip
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

from datasets import DataError, Preprocessing, Volume, read_scan, read_volume, write_slice, write_volume
from datasets.acdc import CLASS_NAMES
from datasets.image_files import read_image, read_mask
from datasets.lists import read_list
from datasets.scan import read_scan_label
from networks import NetworkError
from tests.conftest import files
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import RunError

SEED = os.environ.get("FUZZ_SEED", "2222")
COUNTS = [pytest.param(25, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)]
PLAIN = {"dataset": "acdc", "class_names": list(CLASS_NAMES), "preprocessing": {"orientation": None, "window": None}}
VOXELS = np.random.default_rng(5).permutation(840).reshape(3, 20, 14)
LABEL = (VOXELS % 4).astype(np.uint8)
PHOTOGRAPH = np.stack([VOXELS[0] // 4] * 3, -1).astype(np.uint8)
CHECKED = ("slice", "volume", "scan.gz", "label.gz", "png", "mask")
"""Kinds whose format has checksums: damage never changes what is read."""


def volume_named(class_names: tuple[str, ...] = CLASS_NAMES) -> Volume:
    image, affine = (VOXELS / 840).astype(np.float32), np.diag([1.25, 1.5, 8.0, 1.0])
    return Volume("a", image, LABEL, (8.0, 1.5, 1.25), affine, class_names, "RAS", "int16")


def written(write: Callable[..., object], opened: Callable = lambda content, _: nullcontext(content)) -> bytes:
    """Return what a function writes into a file that is opened in memory."""
    content = io.BytesIO()
    with opened(content, "w") as file:
        write(file)
    return content.getvalue()


def slice_of(npy: bytes) -> bytes:
    """Return a slice whose image and label are these bytes."""
    archive = partial(zipfile.ZipFile, compression=zipfile.ZIP_DEFLATED)
    return written(lambda file: [file.writestr(name, npy) for name in ("image.npy", "label.npy")], archive)


hdf5 = partial(written, opened=h5py.File)
PLAIN_HDF5 = hdf5(lambda file: file.update(image=VOXELS.astype(np.float64), label=LABEL.astype(np.int32)))


def nifti(array: np.ndarray) -> bytes:
    return nibabel.Nifti1Image(array.T, np.diag([1.5, 1.5, 4.0, 1.0]), dtype=array.dtype).to_bytes()


def picture(form: str, array: np.ndarray = PHOTOGRAPH, **options) -> bytes:
    return written(lambda content: Image.fromarray(array).save(content, form, **options))


def values_of_volume(path: Path) -> list:
    volume = read_volume(path, 4)
    volume.to_nifti(volume.label)
    return list(vars(volume).values())


def values_of_slice(path: Path) -> list:
    single = read_volume(path, 4, ndim=2)
    return [single.image, single.label]


def values_of_scan(path: Path) -> list:
    volume = read_scan(path, Preprocessing("LAS", (-125.0, 275.0)))
    volume.to_nifti(np.zeros(volume.image.shape, np.uint8))
    return [np.asarray(volume.image), volume.spacing, volume.affine, volume.orientation, volume.stored_type]


def values_of_label(path: Path) -> list:
    whole = path.with_name("whole.nii")
    whole.write_bytes(nifti(LABEL))
    return [read_scan_label(path, read_scan(whole, Preprocessing("LAS")), 4)]


READERS: dict[str, tuple[str, Callable[[Path], list]]] = {
    **{kind: ("a.npz", values_of_slice) for kind in ("slice", "foreign slice")},
    "volume": ("a.npy.h5", values_of_volume),
    "foreign volume": ("a.h5", values_of_volume),
    "scan": ("a.nii", values_of_scan),
    "scan.gz": ("a.nii.gz", values_of_scan),
    "label.gz": ("a.nii.gz", values_of_label),
    **{f"scan.{ending}": (f"a.{ending}", values_of_scan) for ending in ("nrrd", "mha", "dcm")},
    "mask": ("a.png", lambda path: [read_mask(path, num_classes=4)]),
    **{ending: (f"a.{ending}", lambda path: [read_image(path)]) for ending in ("png", "jpg", "tif", "bmp")},
    "list": ("train.txt", lambda path: read_list(path.parent, path.stem)),
    "checkpoint": ("best.pth", lambda path: [repr(load_checkpoint(path))]),
}
"""By kind of file, its name and the function that returns what is read from it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """By kind of file, one that is as it should be."""
    folder = tmp_path_factory.mktemp("whole")
    write_slice(folder / "slice", volume_named(), 1)
    write_volume(folder / "volume", volume_named())
    scan = SimpleITK.GetImageFromArray(VOXELS.astype(np.int16))
    for kind, image in (("scan.nrrd", scan), ("scan.mha", scan), ("scan.dcm", scan[:, :, 1])):
        SimpleITK.WriteImage(image, str(folder / kind), True)
    save_checkpoint(folder / "checkpoint", {"model": {"w": torch.arange(50.0)}, "network": {}, "data": PLAIN})
    return {
        **{path.name: path.read_bytes() for path in folder.iterdir()},
        "foreign slice": written(lambda content: np.savez(content, img=VOXELS[0] / 840, label=LABEL[0].astype(int))),
        "foreign volume": PLAIN_HDF5,
        "scan": nifti(VOXELS.astype(np.int16)),
        "scan.gz": gzip.compress(nifti(VOXELS.astype(np.int16)), mtime=0),
        "label.gz": gzip.compress(nifti(LABEL), mtime=0),
        "jpg": picture("JPEG", progressive=True),
        "tif": picture("TIFF", compression="tiff_lzw"),
        "mask": picture("PNG", LABEL[0]),
        **{kind: picture(kind) for kind in ("png", "bmp")},
        "list": "patient001_frame01.npz\r\n\r\n  ٣\r\n".encode(),
    }


def refusal(read: Callable[[], object], path: Path) -> str | None:
    """Return the line by which a reader refuses a file, or None where it reads it."""
    try:
        read()
    except (DataError, RunError, NetworkError) as error:
        assert str(error).isprintable() and str(path) in str(error) and len(str(error)) < 1500
        return str(error)
    return None


def refused_file(tmp_path: Path, kind: str, content: bytes) -> str:
    """Expect that a reader refuses a file; return the line."""
    name, read = READERS[kind]
    (tmp_path / name).write_bytes(content)
    line = refusal(lambda: read(tmp_path / name), tmp_path / name)
    assert line, f"this {kind} was read"
    return line


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite bytes or cut a file, more often near its beginning, where headers are."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(rng.choice((len(damaged), min(len(damaged), 400))) + 1)
        length = rng.choice((1, 2, 4, 8, 100))
        how = rng.choice(("flip", "flip", "flip", "set", "cut", "end"))
        if how == "flip" and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif how == "set":
            damaged[at : at + length] = bytes([rng.choice((0, 1, 127, 128, 255))]) * len(damaged[at : at + length])
        elif how in ("cut", "end"):
            del damaged[at : at + length if how == "cut" else None]
    return bytes(damaged)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(whole, tmp_path, kind, count):
    name, read = READERS[kind]
    path = tmp_path / name
    path.write_bytes(whole[kind])
    original = repr(read(path))
    for index in range(count):
        path.write_bytes(damage(whole[kind], random.Random(f"{SEED} {kind} {index}")))
        found: list = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = refusal(lambda found=found: found.append(repr(read(path))), path)
        if line is None and kind in CHECKED:
            assert found[0] == original, f"{kind} {index}, FUZZ_SEED={SEED}: read, but wrong"


@dataclass
class Trap:
    """Makes a folder when it is unpickled."""

    path: Path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_is_run(tmp_path):
    trap = Trap(tmp_path / "ran")
    pickles = pickle.dumps(trap)
    state = {"model": {}, "network": {}, "data": PLAIN | {"class_names": trap}}
    for kind, content in (
        ("slice", written(lambda content: np.savez(content, image=np.array([trap], object), label=LABEL[0]))),
        ("slice", slice_of(pickles)),
        ("slice", pickles),
        ("checkpoint", written(lambda content: torch.save(state, content))),
        ("checkpoint", written(lambda content: torch.save(state, content, _use_new_zipfile_serialization=False))),
        ("checkpoint", pickles),
    ):
        refused_file(tmp_path, kind, content)
        assert not trap.path.exists()
    pickle.loads(pickles)
    assert trap.path.exists()  # so it does, where it is unpickled


def test_an_hdf5_file_reads_nothing_but_itself(tmp_path):
    (tmp_path / "other.h5").write_bytes(PLAIN_HDF5)
    layout = h5py.VirtualLayout(VOXELS.shape, "f4")
    layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "image", VOXELS.shape)
    for add_image in (
        lambda file: file.__setitem__("image", h5py.ExternalLink(str(tmp_path / "other.h5"), "/image")),
        lambda file: file.__setitem__("image", h5py.SoftLink("/label")),
        lambda file: file.create_dataset("image", VOXELS.shape, "u1", external=[(str(tmp_path / "other.h5"), 0, 840)]),
        lambda file: file.create_virtual_dataset("image", layout),
        lambda file: file.create_group("image"),
    ):
        content = hdf5(lambda file, add=add_image: (add(file), file.__setitem__("label", LABEL)))
        assert "is a link, a group or in another file" in refused_file(tmp_path, "volume", content)


def test_absurd_sizes_are_refused_before_anything_is_read(tmp_path):
    header = bytearray(nifti(VOXELS.astype(np.int16)))
    struct.pack_into("<4h", header, 40, 3, 32767, 32767, 32767)
    npy = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }"
    npy = b"\x93NUMPY\x01\x00" + len(npy).to_bytes(2, "little") + npy
    png = bytearray(picture("PNG"))
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    sparse = dict(shape=(900, 1000, 1000), dtype="f4", chunks=(1, 100, 100))
    for kind, content, words in (
        ("scan", bytes(header), "GiB"),
        ("scan.gz", gzip.compress(bytes(header)), "GiB"),
        ("scan.gz", gzip.compress(nifti(LABEL) + bytes(1)), "continues after"),
        ("slice", slice_of(npy), "memory"),
        ("volume", hdf5(lambda file: [file.create_dataset(key, **sparse) for key in ("image", "label")]), "written"),
        ("png", bytes(png), "pixels"),
    ):
        assert words in refused_file(tmp_path, kind, content)


def test_no_name_leads_out_of_the_output_folder(trained, tmp_path, run_script):
    names = ["../../evil", "/tmp/evil", "a\\..\\b"]
    scans, volumes = tmp_path / "in" / "scans", tmp_path / "in" / "volumes"
    scans.mkdir(parents=True)
    state = torch.load(trained / "best.pth", weights_only=True)
    save_checkpoint(tmp_path / "in" / "best.pth", state | {"data": PLAIN | {"class_names": names}})
    for name in ("..", "\\..\\b$(x)"):
        (scans / f"a{name}.nii.gz").write_bytes(gzip.compress(nifti(np.zeros((1, 8, 9), np.int16)), 1))
    write_volume(volumes / "patient001_frame01.npy.h5", volume_named(tuple(names)))
    (volumes / "test.txt").write_text("patient001\n")
    before = files(tmp_path)
    common = ("--device", "cpu", "--overlays", 1, "--checkpoint", tmp_path / "in" / "best.pth")
    run_script("predict.py", *common, "--input", scans, "--output", tmp_path / "out" / "predicted").succeeded()
    saving = ("--is_savenii", "--test_save_dir", tmp_path / "out" / "tested")
    run_script("test_acdc.py", *common, *saving, "--volume_path", volumes, "--list_dir", volumes).succeeded()
    after = files(tmp_path)
    assert before.items() <= after.items()
    new = {path.parts[:2] for path in after.keys() - before.keys()}
    assert new == {("out", "predicted"), ("out", "tested")} and not Path("/tmp/evil").exists()
