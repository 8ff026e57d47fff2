"""A bad file is refused in one line that names it, or read right; none hangs, crashes, runs code or fills the memory.

Some 300 cases by default, some 3,000 with ``-m slow``. FUZZ_SEED chooses other cases, FUZZ_CASES how many are damaged
at random:

    FUZZ_SEED=7 FUZZ_CASES=5000 .venv/bin/python -m pytest -m slow tests/fuzz
"""

import gzip
import io
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import Volume, write_slice, write_volume
from datasets.acdc import CLASS_NAMES
from networks import SimMPNet
from tests.fuzz.worker import MEMORY, Worker, stand_in
from utils.checkpoint import save_checkpoint

nibabel = pytest.importorskip("nibabel")

SEED = int(os.environ.get("FUZZ_SEED", "2222"))
SIZES = [
    pytest.param((220, 8), id="short"),
    pytest.param((2200, 80), id="nightly", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]
"""Cases damaged at random, over all kinds of files; and examples of each of hypothesis's tests."""

PLAIN = {"dataset": "acdc", "class_names": list(CLASS_NAMES), "preprocessing": {"orientation": None, "window": None}}


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.close()


@dataclass(frozen=True)
class Case:
    """A file that a reader is given: its name, its content, and how it came about."""

    reader: str
    name: str
    content: bytes
    story: str
    original: str | None = None  # digest of what an undamaged file gives, where damage cannot pass unseen


@pytest.fixture
def judge(worker, tmp_path_factory) -> Callable[[Case], str]:
    """Give a case to the worker; a failure keeps its file and says how to come by it again."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "data" / "masks").mkdir()
    for name in ("a.npz", "patient001_frame01.npz", "٣.npz", "x_2.npz", "images/a.png", "images/٣.png", "masks/a.png"):
        (folder / "data" / name).touch()

    def check(case: Case) -> str:
        path = folder / case.name
        path.write_bytes(case.content)
        outcome = worker(case.reader, path)
        silent = outcome.kind == "read" and case.original not in (None, outcome.digest)
        if outcome.kind == "failed" or silent:
            kept = Path(shutil.copy(path, folder.parent / f"failed_{zlib.crc32(case.content):08x}_{case.name}"))
            path.unlink()
            text = "damaged, and read without a word" if silent else outcome.text
            pytest.fail(f"{case.reader}, {case.story}, FUZZ_SEED={SEED}, kept as {kept}:\n{text}", pytrace=False)
        path.unlink()
        return outcome.kind if outcome.kind == "read" else outcome.text

    return check


# Files as they should be


def make_volume(dtype=np.float32) -> Volume:
    rng = np.random.default_rng(5)
    image = (rng.permutation(3 * 20 * 14) / 840).reshape(3, 20, 14).astype(dtype)
    label = rng.integers(0, 4, image.shape).astype(np.uint8)
    affine = np.diag([1.25, 1.5, 8.0, 1.0])
    return Volume("a", image, label, (8.0, 1.5, 1.25), affine, CLASS_NAMES, "RAS", "int16")


def written(folder: Path, name: str, write: Callable[[Path], object]) -> bytes:
    path = folder / name
    write(path)
    return path.read_bytes()


def hdf5(build: Callable[[h5py.File], object], **options) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w", **options) as file:
        build(file)
    return content.getvalue()


def plain_hdf5(file: h5py.File) -> None:
    volume = make_volume()
    file["image"], file["label"] = volume.image.astype(np.float64), volume.label.astype(np.int32)


def packed_hdf5(file: h5py.File) -> None:
    volume = make_volume()
    file.create_dataset("image", data=volume.image, chunks=(2, 7, 5), compression="gzip", maxshape=(None, None, None))
    file.create_dataset("label", data=volume.label, chunks=(1, 20, 9), shuffle=True)
    file.attrs["class_names"] = list(CLASS_NAMES)
    file.attrs["spacing"] = (8.0, 1.5, 1.25)


def nifti(array: np.ndarray, kind: str = "Nifti1Image", slope: tuple[float, float] | None = None) -> bytes:
    image = getattr(nibabel, kind)(array, np.diag([1.5, 1.5, 4.0, 1.0]), dtype=array.dtype)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    return image.to_bytes()


def picture(form: str, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    y, x = np.mgrid[0:30, 0:41]
    image = Image.fromarray(np.stack([5 * y, 6 * x, 3 * (x + y)], -1).astype(np.uint8))
    if mode == "mask":
        image = Image.fromarray((x // 11).astype(np.uint8))
    elif mode == "P":
        image = image.quantize(16)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(content, form, **options)
    return content.getvalue()


def checkpoint_state(**changes) -> dict:
    model = stand_in()(4, model_scale="pico", img_size=64, img_size_dmwla=32)
    state = {"model": model.state_dict(), "network": model.config, "data": dict(PLAIN), "epoch": 3, "best_dice": 0.5}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            state[part] = {**state[part], name: value}
        else:
            state[part] = value
    return state


def saved(state: object) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def release_state() -> dict:
    """Return what a bare state dict of the release must have to be recognised, in its own names."""
    weights = {f"module.{key}": torch.ones(1) for key in ("conv.0.weight", "backbone1.norm.weight")}
    for name in ("module.DMWLA_1.0", *(f"module.decoder.DMWLA_{level}" for level in (1, 2, 3, 4))):
        weights[f"{name}.concept_proto"], weights[f"{name}.concept_pool"] = torch.ones(8, 2), torch.ones(8, 8)
    return weights | {"module.out_head1.bias": torch.zeros(4), "module.out_head1.weight": torch.zeros(4, 4, 1, 1)}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> dict[str, list[tuple[str, str, bytes]]]:
    """By kind of file, those that are damaged: (reader, name, content)."""
    folder = tmp_path_factory.mktemp("seeds")
    volume = make_volume()
    ints = np.round(300 * volume.image.T).astype(np.int16)
    stored = io.BytesIO()
    np.savez(stored, img=volume.image[0].astype(np.float64), label=volume.label[0].astype(np.int64))
    exif = Image.Exif()
    exif[0x0112] = 6
    save_checkpoint(folder / "best.pth", checkpoint_state())
    scans = [nifti(ints, slope=(2.0, -100.0)), nifti(volume.image.T), nifti(ints.astype(">i4"), "Nifti2Image")]
    labels = [nifti(volume.label.T), nifti(volume.label.T.astype(np.float32))]
    return {
        "npz": [
            ("slice", "s.npz", written(folder, "s.npz", lambda path: write_slice(path, volume, 1))),
            ("slice", "s.npz", stored.getvalue()),
        ],
        "h5": [
            ("volume", "v.npy.h5", written(folder, "v.npy.h5", lambda path: write_volume(path, volume))),
            ("volume", "v.h5", hdf5(plain_hdf5)),
            ("volume", "v.h5", hdf5(packed_hdf5)),
            ("volume", "v.h5", hdf5(packed_hdf5, libver="latest")),
        ],
        "nii": [("scan", "a.nii", scan) for scan in scans] + [("scan label", "a.nii", label) for label in labels],
        "nii.gz": [("scan", "a.nii.gz", gzip.compress(scan, mtime=0)) for scan in scans]
        + [("scan label", "a.nii.gz", gzip.compress(labels[0], mtime=0))],
        "bmp": [("image", "a.bmp", picture("BMP")), ("image", "a.bmp", picture("BMP", "P"))],
        "jpg": [
            ("image", "a.jpg", picture("JPEG", exif=exif)),
            ("image", "a.jpg", picture("JPEG", progressive=True)),
            ("image", "a.jpg", picture("JPEG", "CMYK")),
        ],
        "png": [
            ("image", "a.png", picture("PNG", exif=exif)),
            ("image", "a.png", picture("PNG", "P")),
            ("mask", "a.png", picture("PNG", "mask")),
        ],
        "tif": [
            ("image", "a.tif", picture("TIFF")),
            ("image", "a.tif", picture("TIFF", compression="tiff_lzw")),
            ("image", "a.tif", picture("TIFF", "L", compression="tiff_adobe_deflate")),
            ("mask", "a.tif", picture("TIFF", "mask", compression="packbits")),
        ],
        "list": [
            ("list", "train.txt", b"a\npatient001\nx_2\n"),
            ("list", "train.txt", "\ufeffpatient001_frame01.npz\r\n\r\n  ٣\r\n".encode()),
        ],
        "checkpoint": [
            ("checkpoint", "best.pth", (folder / "best.pth").read_bytes()),
            ("checkpoint", "best.pth", saved(release_state())),
        ],
    }


KINDS = ("npz", "h5", "nii", "nii.gz", "bmp", "jpg", "png", "tif", "list", "checkpoint")


def test_the_undamaged_files_are_read(seeds, judge):
    assert tuple(seeds) == KINDS
    for kind, files in seeds.items():
        for reader, name, content in files:
            found = judge(Case(reader, name, content, "undamaged"))
            is_release = kind == "checkpoint" and b"concept_proto" in content
            assert "not the release's" in found if is_release else found == "read", (kind, name, found)


# Damage at random


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change, cut out, double or put in a few bytes, more often near the beginning and the end; returns how, too."""
    content, story = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        ends = (rng.randrange(512), rng.randrange(4096), len(content) - 1 - rng.randrange(200))
        at = rng.choice((*ends, rng.randrange(len(content) + 1)))
        at = min(max(at, 0), len(content))
        length = min(rng.choice((1, 2, 4, 8, 100, 5000)), len(content) - at)
        how = rng.choice(("flip", "flip", "flip", "set", "number", "cut", "end", "double", "insert"))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == "set":
            content[at : at + length] = bytes([rng.choice((0, 1, 127, 128, 255))]) * length
        elif how == "number":
            number = rng.choice((0, 1, -1, 2**15 - 1, 2**16, 2**31 - 1, -(2**31), 2**40, 2**63 - 1))
            width = rng.choice((2, 4, 8))
            number = (number % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
            content[at : at + width] = number
        elif how == "cut":
            del content[at : at + length]
        elif how == "end":
            del content[at:]
        elif how == "double":
            content[at:at] = content[at : at + length]
        elif how == "insert":
            content[at:at] = rng.randbytes(length)
        story.append(f"{how} {length} at {at}")
    return bytes(content), ", ".join(story)


def rezip(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """Change the members of a zip archive and keep it sound: every checksum is that of the new content."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as new:
        for info in archive.infolist():
            new.writestr(info.filename, change(info.filename, archive.read(info)), info.compress_type)
    return out.getvalue()


NIFTI_FIELDS = {
    "sizeof_hdr": (0, "<i"), "dim0": (40, "<h"), "dim1": (42, "<h"), "dim2": (44, "<h"), "dim3": (46, "<h"),
    "dim4": (48, "<h"), "datatype": (70, "<h"), "bitpix": (72, "<h"), "pixdim0": (76, "<f"), "pixdim3": (88, "<f"),
    "vox_offset": (108, "<f"), "scl_slope": (112, "<f"), "scl_inter": (116, "<f"), "qform_code": (252, "<h"),
    "sform_code": (254, "<h"), "quatern_b": (256, "<f"), "srow_x": (280, "<f"), "srow_z3": (324, "<f"),
    "extension": (348, "<i"), "esize": (352, "<i"),
}  # fmt: skip
WHOLE = (0, 1, -1, 2, 4, 5, 14, 20, 30000, -32768, 16, 64, 128, 512, 768, 1024, 1536, 1792, 2048, 2304)
REAL = (0.0, 1.0, -1.0, 352.0, 353.0, 1e6, 1e30, -1e30, 3e38, 1e-45, float("inf"), float("-inf"), float("nan"), 2.0**31)


def damage_nifti(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Give fields of a NIfTI header values that no scan has."""
    content, story = bytearray(content), []
    for name in rng.sample(sorted(NIFTI_FIELDS), rng.choice((1, 1, 2, 3))):
        at, form = NIFTI_FIELDS[name]
        value = rng.choice(REAL if form == "<f" else WHOLE)
        struct.pack_into(form, content, at, value)
        story.append(f"{name} = {value}")
    return bytes(content), ", ".join(story)


def damaged(kind: str, content: bytes, rng: random.Random) -> tuple[bytes, str, bool]:
    """Return a damaged file of a kind, how it is damaged, and whether its checksums must tell."""
    inside = rng.random() < 0.6
    if kind == "nii":
        content, story = (damage_nifti if inside else damage)(content, rng)
        return content, story, False
    if kind == "nii.gz" and inside:
        inner, story = (damage_nifti if rng.random() < 0.5 else damage)(gzip.decompress(content), rng)
        return gzip.compress(inner, mtime=0), f"unpacked, {story}", False
    if kind in ("npz", "checkpoint") and inside:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen, stories = rng.choice(names + 3 * pickles), []

        def change(name: str, member: bytes) -> bytes:
            if name == chosen:
                member, story = damage(member, rng)
                stories.append(f"{name}, {story}")
            return member

        return rezip(content, change), stories[0], False
    content, story = damage(content, rng)
    return content, story, kind in ("npz", "nii.gz", "png", "checkpoint")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_random(seeds, worker, judge, kind, size, tmp_path):
    count = -(-int(os.environ.get("FUZZ_CASES", size[0])) // len(KINDS))
    originals = []
    for reader, name, content in seeds[kind]:
        (tmp_path / name).write_bytes(content)
        originals.append(worker(reader, tmp_path / name).digest)
    for index in range(count):
        rng = random.Random(f"{SEED} {kind} {index}")
        number = rng.randrange(len(originals))
        reader, name, content = seeds[kind][number]
        content, story, must_tell = damaged(kind, content, rng)
        story = f"{kind} {index} of file {number}: {story}"
        judge(Case(reader, name, content, story, originals[number] if must_tell else None))


# Files that someone has thought of


def explore(examples: int, strategy: st.SearchStrategy, check: Callable) -> None:
    """Let hypothesis look for an example that fails."""

    @seed(SEED)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def example(drawn: object) -> None:
        check(drawn)

    example()


NAMES = st.one_of(
    st.sampled_from(
        ["a", "patient001", "x_2.npz", "٣", "..", ".", ".a", "a/../b", "/etc/passwd", "a\\b", "C:a", "a\0b"]
    ),
    st.text(max_size=20),
    st.integers(200, 3000).map(lambda length: "ä" * length),
)


@pytest.mark.parametrize("size", SIZES)
def test_lists_of_any_text(judge, size):
    lines = st.lists(NAMES, max_size=6).map(lambda names: "\n".join(names).encode("utf-8", "surrogatepass"))
    explore(
        size[1], st.one_of(lines, st.binary(max_size=60)), lambda content: judge(Case("list", "val.txt", content, ""))
    )


def test_a_list_without_end_and_one_with_many_entries_twice(judge):
    assert "too long" in judge(Case("list", "val.txt", b"a\n" * 2**24, "16 million lines"))
    names = "\n".join(f"case{number}" for number in range(200_000))
    assert "twice" in judge(Case("list", "val.txt", f"{names}\ncase199999\n".encode(), "the last two are equal"))


DTYPES = st.sampled_from(
    "b1 i1 u1 >i2 i4 i8 u8 f2 f4 >f8 g c8 c16 S3 U3 V8 O M8[s] m8[ns] f4,i2 (2,)f4 U0 S0 V0 f4,O".split()
)
SHAPES = st.one_of(
    st.sampled_from([(5, 4), (), (0, 4), (5,), (1, 5, 4), (5, 4, 1), (4, 5)]),
    st.lists(st.sampled_from([-1, 0, 1, 2, 5, 2**16, 2**31, 2**62, 10**30]), max_size=40).map(tuple),
)
VALUES = st.sampled_from([0, 1, 3, 4, 200, -1, 300, 0.5, np.nan, -np.inf, 1e39])
KEYS = st.sampled_from(
    "image img label spacing class_names orientation stored_type affine ../../evil /etc/evil".split()
)


def npy(dtype: str, shape: tuple, value: float, declared: tuple | None, version: int, trap: object) -> bytes:
    """Return a member of an npz file; ``declared`` is the shape that its header says."""
    kind = np.dtype(dtype)
    small = tuple(shape) if len(shape) < 4 and all(0 <= n < 10 for n in shape) else ()
    array = np.zeros(small, kind)
    if kind.kind in "biufc":
        with np.errstate(all="ignore"):
            array[...] = np.asarray(value).astype(kind)
    elif kind.hasobject:
        data = pickle.dumps(trap)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": declared or array.shape}
    text = repr(header).encode() + b"\n"
    data = data if kind.hasobject else array.tobytes()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_npz_files_of_any_keys_shapes_and_types(judge, size, tmp_path):
    members = st.dictionaries(
        st.tuples(KEYS, st.sampled_from([".npy", ".npy", ".npy", ""])),
        st.tuples(DTYPES, SHAPES, VALUES, st.one_of(st.none(), SHAPES), st.sampled_from([1, 1, 2, 3, 0])),
        max_size=3,
    )
    image = st.tuples(st.sampled_from(["f4", "f8", "u1", "O", "c8"]), st.just((5, 4)), VALUES, st.none(), st.just(1))
    trap = Trap(tmp_path / "ran")

    def check(drawn: tuple[dict, tuple, tuple]) -> None:
        found = {("image", ".npy"): drawn[1], ("label", ".npy"): drawn[2]} | drawn[0]
        content = npz({"".join(name): npy(*parts, trap) for name, parts in found.items()})
        judge(Case("slice", "s.npz", content, str(found)))
        assert not trap.path.exists()

    explore(size[1], st.tuples(members, image, image), check)


def link(target: str) -> Callable[[h5py.File], object]:
    def build(file: h5py.File) -> None:
        file["label"] = np.zeros((1, 5, 4), np.uint8)
        file["image"] = h5py.ExternalLink(target, "/image") if target else h5py.SoftLink("/image")

    return build


def elsewhere(file: h5py.File) -> None:
    file["label"] = np.zeros((1, 5, 4), np.uint8)
    file.create_dataset("image", (1, 5, 4), "u1", external=[("/etc/passwd", 0, 20)])


def composed(file: h5py.File) -> None:
    file["label"] = np.zeros((1, 5, 4), np.uint8)
    layout = h5py.VirtualLayout((1, 5, 4), "f4")
    layout[...] = h5py.VirtualSource("/etc/other.h5", "image", (1, 5, 4))
    file.create_virtual_dataset("image", layout)


def groups(file: h5py.File) -> None:
    file["image/label"], file["label"] = np.zeros((1, 5, 4), np.uint8), np.zeros((1, 5, 4), np.uint8)


def test_an_hdf5_file_reads_nothing_but_itself(judge, tmp_path):
    (tmp_path / "other.h5").write_bytes(hdf5(plain_hdf5))
    for build, words in (
        (link(str(tmp_path / "other.h5")), "is a link"),
        (link(""), "is a link"),
        (elsewhere, "lie in another file"),
        (composed, "lie in another file"),
        (groups, "is a group"),
    ):
        assert words in judge(Case("volume", "v.h5", hdf5(build), words))


def test_a_heap_that_leads_nowhere_is_no_hang(judge):
    """HDF5 2.0 goes round for ever in a heap with a part of no size."""
    content = hdf5(packed_hdf5)
    heap = content.index(b"GCOL")
    for at, part in ((heap + 16, bytes(16)), (heap + 24, b"\xf0" + b"\xff" * 7), (heap + 8, b"\xff" * 8)):
        damaged = content[:at] + part + content[at + len(part) :]
        assert "a heap" in judge(Case("volume", "v.h5", damaged, f"{part} at {at}"))


FACTS = st.one_of(
    st.sampled_from(
        [h5py.Empty("f4"), np.void(b"abc"), np.zeros((2, 3), complex), "RAS", "int16", b"\xff\xfe", "a\nb"]
    ),
    st.text(max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=3),
    st.lists(st.floats(), min_size=1, max_size=4),
    st.lists(st.floats(), min_size=16, max_size=16).map(lambda numbers: np.reshape(numbers, (4, 4))),
    st.integers(-(2**63), 2**63 - 1),
)


@pytest.mark.parametrize("size", SIZES)
def test_hdf5_files_of_any_types_and_facts(judge, size):
    types = st.sampled_from(
        ["f4", "f8", ">i2", "u1", "b1", "c8", "S3", "f4,i2", "(2,)f4", "g", "text", "ref", "vlen", "null"]
    )
    shapes = st.sampled_from(
        [(1, 5, 4), (1, 5, 4), (), (5, 4), (0, 5, 4), (2**20, 2**20, 4), (2**10, 2**10, 900), (2**30,)]
    )
    arrays = st.tuples(types, shapes, VALUES, st.sampled_from([None, None, "gzip", "lzf", "scaleoffset"]))
    keys = st.sampled_from(["spacing", "affine", "class_names", "orientation", "stored_type"])
    special = {"text": h5py.string_dtype(), "ref": h5py.ref_dtype, "vlen": h5py.vlen_dtype(np.int32)}

    def build(file: h5py.File, drawn: tuple) -> None:
        for key, (name, shape, value, packing) in zip(("image", "label"), drawn[:2], strict=True):
            if name == "null":
                file[key] = h5py.Empty("f4")
                continue
            dtype = special.get(name) or np.dtype(name)
            numeric = dtype.kind in "biufc" and dtype.shape == ()
            with np.errstate(all="ignore"):
                fill = np.asarray(value).astype(dtype) if numeric else None
            options = {"scaleoffset": 2} if packing == "scaleoffset" else {"compression": packing}
            if not shape or not numeric or (packing == "scaleoffset" and dtype.kind not in "iu"):
                options = {}
            chunks = tuple(min(n, 64) for n in shape) if shape and np.prod(shape, dtype=float) > 1e5 else None
            file.create_dataset(key, shape, dtype, fillvalue=fill, chunks=chunks, **options)
        for key, value in drawn[2].items():
            try:
                file.attrs[key] = value
            except (TypeError, ValueError):  # not to be written, so not to be read
                continue

    def check(drawn: tuple) -> None:
        try:
            content = hdf5(lambda file: build(file, drawn))
        except (TypeError, ValueError):
            return
        judge(Case("volume", "v.h5", content, str(drawn)))

    explore(size[1], st.tuples(arrays, arrays, st.dictionaries(keys, FACTS, max_size=3)), check)


def png_of(width: int, height: int) -> bytes:
    content = bytearray(picture("PNG", "mask"))
    content[16:24] = struct.pack(">II", width % 2**32, height % 2**32)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    content = bytearray(picture("BMP"))
    content[18:26] = struct.pack("<II", width % 2**32, height % 2**32)
    return bytes(content)


def jpg_of(width: int, height: int) -> bytes:
    content = bytearray(picture("JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    return bytes(content)


def tif_of(width: int, height: int) -> bytes:
    """Return a TIFF of one deflated strip that declares a size."""
    strip = zlib.compress(bytes(10_000))
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 8),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(strip)),
    ]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value % 2**32) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + body + bytes(4)


@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_declared_size(judge, size):
    sides = st.one_of(st.integers(-3, 100), st.sampled_from([8_000, 9_999, 65_535, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
    forms = st.sampled_from([("a.png", png_of), ("a.bmp", bmp_of), ("a.jpg", jpg_of), ("a.tif", tif_of)])
    readers = st.sampled_from(["image", "mask"])

    def check(drawn: tuple) -> None:
        (name, make), reader, width, height = drawn
        judge(Case(reader, name, make(width, height), f"{width} x {height}"))

    explore(size[1], st.tuples(forms, readers, sides, sides), check)


def nifti_header(dims: tuple, datatype: int, slope: tuple[float, float], offset: float) -> bytes:
    header = bytearray(nifti(np.zeros((1, 1, 1), np.int16))[:352])
    for at, form, value in (
        (40, "<8h", (*dims, *(1,) * 8)[:8]), (70, "<h", (datatype,)), (112, "<2f", slope), (108, "<f", (offset,)),
    ):  # fmt: skip
        struct.pack_into(form, header, at, *value)
    return bytes(header)


@pytest.mark.parametrize("size", SIZES)
def test_nifti_files_of_any_declared_shape(judge, size):
    side = st.sampled_from([-1, 0, 1, 2, 3, 1000, 32767])
    datatypes = st.sampled_from(
        [(1, 1), (2, 8), (4, 16), (16, 32), (64, 64), (128, 24), (1536, 128), (768, 32), (99, 8)]
    )
    slopes = st.tuples(st.sampled_from(REAL), st.sampled_from(REAL))

    def check(drawn: tuple) -> None:
        dims, (datatype, bits), slope, offset, extra, packed = drawn
        content = bytearray(nifti_header((len(dims), *dims), datatype, slope, offset))
        struct.pack_into("<h", content, 72, bits)
        voxels = min(max(int(np.prod(dims, dtype=float)), 0), 1000) * bits // 8
        content = bytes(content) + b"\x01" * (voxels + extra)
        name = "a.nii.gz" if packed else "a.nii"
        judge(Case(drawn[-1] or "scan", name, gzip.compress(content) if packed else content, str(drawn)))

    dims = st.lists(side, max_size=7)
    extra, offset = st.sampled_from([0, 0, 0, 1, 1000]), st.sampled_from([352.0, 352.0, 352.0, 0.0, 1e9, -1.0, 400.0])
    readers = st.sampled_from(["", "scan label"])
    explore(size[1], st.tuples(dims, datatypes, slopes, offset, extra, readers), check)


PLAIN_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([2**31, 2**63, 10**30]), st.floats(),
        st.sampled_from(["hub", "paper", "release", "a\nb", "../../evil", ""]),
        st.sampled_from([torch.ones(2), torch.ones(()), torch.ones(3, device="meta"), torch.ones(1).expand(10**6, 9)]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip
PARTS = st.sampled_from(
    "model network data network__num_classes network__feature_dim network__columns_per_cluster network__img_size "
    "network__img_size_dmwla network__pretrained network__variant network__model_scale network__warmup_iterations "
    "data__class_names data__dataset data__preprocessing data__selected_on model__heads.0.bias "
    "model__dmwla_encoder.stages.0.0.bank.pool model__decoder.dmwla.0.bank.pool model__extra".split()
)


@pytest.mark.parametrize("size", SIZES)
def test_checkpoints_of_any_content(judge, size, tmp_path):
    changes = st.dictionaries(PARTS, PLAIN_VALUES, max_size=3)

    def check(drawn: tuple) -> None:
        changes, reader = drawn
        try:
            state = checkpoint_state(**changes)
        except TypeError:  # the part that the second change would be in is no dictionary any more
            return
        judge(Case(reader, "best.pth", saved(state), str(changes)))

    explore(size[1], st.tuples(changes, st.sampled_from(["checkpoint", "predictor"])), check)
    weights = st.dictionaries(st.sampled_from([*release_state(), "extra", 3]), PLAIN_VALUES, max_size=3)
    explore(
        size[1],
        weights,
        lambda drawn: judge(Case("checkpoint", "best.pth", saved(release_state() | drawn), str(drawn))),
    )


def test_a_whole_network_is_rebuilt_from_what_its_checkpoint_says_or_not_at_all(judge):
    small = dict(img_size=64, img_size_dmwla=32, model_scale="pico", feature_dim=16, decoder_feature_dim=16)
    model = SimMPNet(4, columns_per_cluster=20, **small)
    state = {"model": model.state_dict(), "network": model.config, "data": PLAIN}
    assert judge(Case("predictor", "best.pth", saved(state), "undamaged")) == "read"
    for name, value, words in (
        ("columns_per_cluster", 10**9, "bank.pool is"),
        ("num_clusters", 2**40, "do not fit"),
        ("img_size", 32_000, "expected 1 to"),
        ("img_size_dmwla", 2**20, "expected 1 to"),
        ("img_size", 96.0, "img_size 96.0"),
        ("pretrained", "hub", "'network'"),
        ("model_scale", "huge", "huge"),
        ("model_scale", "nano", "do not fit"),
        ("in_channels", 3, "do not fit"),
        ("replaced_columns", 10**30, "do not fit"),
    ):
        changed = state | {"network": model.config | {name: value}}
        assert words in judge(Case("predictor", "best.pth", saved(changed), f"{name} {value}"))
    weights = state["model"] | {"heads.0.bias": torch.full((4,), torch.nan)}
    assert "heads.0.bias" in judge(Case("predictor", "best.pth", saved(state | {"model": weights}), "NaN"))
    for key, value in (("class_names", ["a"]), ("preprocessing", {"mean": (0.5,) * 3, "std": (0.5,) * 3})):
        changed = state | {"data": PLAIN | {key: value}}
        assert "its data have" in judge(Case("predictor", "best.pth", saved(changed), key))


def test_no_code_of_a_file_is_run(judge, tmp_path):
    trap = Trap(tmp_path / "ran")
    with pytest.raises(FileExistsError):  # so it does, where it is unpickled
        (tmp_path / "ran").mkdir()
        pickle.loads(pickle.dumps(trap))
    (tmp_path / "ran").rmdir()
    objects = io.BytesIO()
    np.savez(objects, image=np.array([trap], dtype=object), label=np.zeros((5, 4), np.uint8))
    legacy = io.BytesIO()
    torch.save(checkpoint_state(args=trap), legacy, _use_new_zipfile_serialization=False)
    for case in (
        Case("slice", "s.npz", objects.getvalue(), "an array of objects"),
        Case("slice", "s.npz", npz({"image.npy": pickle.dumps(trap), "label.npy": pickle.dumps(trap)}), "pickles"),
        Case("slice", "s.npz", pickle.dumps(trap), "a pickle"),
        Case("checkpoint", "best.pth", saved(checkpoint_state(args=trap)), "zip"),
        Case("checkpoint", "best.pth", saved(checkpoint_state(data__class_names=trap)), "zip, deep inside"),
        Case("checkpoint", "best.pth", legacy.getvalue(), "torch's former format"),
        Case("checkpoint", "best.pth", pickle.dumps(trap), "a pickle"),
    ):
        assert "best.pth" in (text := judge(case)) or "s.npz" in text
        assert not (tmp_path / "ran").exists()


# More than fits into memory


def deflated(start: bytes, count: int) -> bytes:
    """Return a raw deflate stream of ``start`` and as many zeros, of which one block stands there repeatedly."""
    packer, unit = zlib.compressobj(9, zlib.DEFLATED, -15), 2**24
    head = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(unit)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(count % unit)) + packer.flush(zlib.Z_FINISH)
    return head + block * (count // unit) + rest


def gzip_of(start: bytes, count: int) -> bytes:
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + deflated(start, count) + bytes(8)


def zip_of(members: dict[str, tuple[bytes, int]], others: dict[str, bytes] | None = None) -> bytes:
    """Return an archive of members that unpack to (start, as many zeros), and of stored ones; checksums are 0."""
    found = {name: (8, deflated(*member), len(member[0]) + member[1]) for name, member in members.items()}
    found |= {name: (0, content, len(content)) for name, content in (others or {}).items()}
    body, directory = b"", b""
    for name, (method, packed, size) in found.items():
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0x21, 0, len(packed), size, len(name), 0)
        directory += b"PK\x01\x02\x14\0" + fields + bytes(10) + struct.pack("<I", len(body)) + name.encode()
        body += b"PK\x03\x04" + fields + name.encode() + packed
    count = len(found)
    return body + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)


def pair(start: bytes, count: int) -> bytes:
    return zip_of({"image.npy": (start, count), "label.npy": (start, count)})


def npy_header(shape: tuple, version: int = 1, length: int | None = None) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    length = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text


def hdf5_of(packed: bytes, filters: int = 1) -> bytes:
    """Return a volume of (1, 5, 4) whose only chunk is stored as ``packed``."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, 5, 4))
    for _ in range(filters):
        plist.set_deflate(9)

    def build(file: h5py.File) -> None:
        file["label"] = np.zeros((1, 5, 4), np.uint8)
        space = h5py.h5s.create_simple((1, 5, 4))
        h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_FLOAT, space, plist).write_direct_chunk((0, 0, 0), packed)

    return hdf5(build)


def progressive(scans: int) -> bytes:
    """Return a JPEG of 4096 x 4096 pixels that says nothing new in very many passes."""
    content = io.BytesIO()
    Image.new("L", (4096, 4096)).save(content, "JPEG", progressive=True)
    content = content.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + b"\xff\xd9"


def test_nothing_takes_more_memory_or_time_than_is_stated(judge, worker):
    much, cube = MEMORY + 2**28, (3, 9, 9, 9)
    endless = nifti_header(cube, 2, (0, 0), 1e3)[:348] + struct.pack("<4B2i", 1, 0, 0, 0, 0, 6)
    zlib_stream = b"\x78\x9c" + deflated(b"", much) + bytes(4)
    records = zipfile.ZipFile(io.BytesIO(saved(checkpoint_state())))
    record = next(name for name in records.namelist() if name.endswith("data/0"))
    others = {name: records.read(name) for name in records.namelist() if name != record}
    for name, content, words in (
        ("a.nii.gz", gzip_of(nifti_header((3, 32767, 32767, 32767), 2, (0, 0), 352), 2**20), "more than the 4 GiB"),
        ("a.nii.gz", gzip_of(nifti_header(cube, 2, (0, 0), 1e9), much), "not a readable NIfTI"),
        ("a.nii.gz", gzip_of(nifti_header(cube, 2, (0, 0), 352), much), "goes on after the voxels"),
        ("a.nii.gz", gzip_of(endless, much), "not a readable NIfTI"),
        ("a.nii.gz", gzip_of(nifti_header((3, 1000, 1000, 1000), 4, (0, 0), 352), 2 * 10**9), "memory"),
        ("s.npz", pair(npy_header((10**7, 10**7)), 2**20), "more than the 4 GiB"),
        ("s.npz", pair(npy_header((2**14, 2**15)), 2**31), "memory"),
        ("s.npz", pair(npy_header((5, 4), 2, 2**32 - 1), much), "not a readable npz"),
        ("s.npz", npz({f"{key}.npy": npy_header((5, 4)) + bytes(80) for key in ("image", "label")}, 12), "method 12"),
        ("v.h5", hdf5_of(zlib_stream), "a chunk that does not end"),
        ("v.h5", hdf5_of(zlib.compress(bytes(79))), "a chunk of 79 bytes, 80 were expected"),
        ("v.h5", hdf5_of(zlib.compress(zlib_stream), 2), "packed by HDF5 filters"),
        ("best.pth", zip_of({record: (b"", much)}, others), "compressed"),
        ("a.jpg", progressive(5000), "more than 200 scans"),
    ):
        readers = {"a.nii.gz": "scan", "s.npz": "slice", "v.h5": "volume", "best.pth": "checkpoint", "a.jpg": "image"}
        found = judge(Case(readers[name], name, content, words))
        assert name in found and words in found
    assert worker.slowest < 15


# Scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> bytes:
    """A checkpoint of an untrained network for ACDC."""
    model = SimMPNet(4, img_size=64, img_size_dmwla=32, model_scale="pico", feature_dim=16, decoder_feature_dim=16)
    path = tmp_path_factory.mktemp("trained") / "best.pth"
    save_checkpoint(path, {"model": model.state_dict(), "network": model.config, "data": PLAIN})
    return path.read_bytes()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scripts_refuse_bad_files_in_one_line_and_write_nothing(seeds, trained, tmp_path, run_script):
    raw, out = tmp_path / "raw", tmp_path / "out"
    half = len(trained) // 2
    scan, photograph = seeds["nii.gz"][0][2], seeds["jpg"][1][2]
    volume = seeds["h5"][0][2]
    files = {
        "good.pth": trained, "bad.pth": flipped(trained, half), "last.pth": trained[:half],
        "bad.nii.gz": flipped(scan, len(scan) - 6), "good.nii.gz": scan,
        "test.txt": b"patient001\n", "lists/test.txt": b"../patient001\n", "train.txt": b"\xff\xfe\n",
        "h5/patient001_frame01.h5": volume[: len(volume) // 2], "link/patient001_frame01.h5": hdf5(link("/etc/a.h5")),
        "nifti/patient001/patient001_frame01.nii.gz": scan, "nifti/patient001/patient001_frame01_gt.nii.gz": scan[:-40],
        "info/patient001/patient001_frame01.nii.gz": scan, "info/patient001/patient001_frame01_gt.nii.gz": scan,
        "info/patient001/Info.cfg": b"ED: " + b"9" * 5000,
        "segpc/x/1.bmp": picture("BMP"), "segpc/y/1_1.bmp": picture("BMP")[:900],
        "isic/images/1.jpg": photograph[:500], "isic/masks/1.png": picture("PNG", "mask"),
    }  # fmt: skip
    for name, content in files.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(content)
    before = everything_in(tmp_path)
    test = ("test_acdc.py", "--device", "cpu", "--test_save_dir", out, "--list_dir", raw)
    prepare = ("prepare_data.py", "--out", out, "--jobs", 1, "--raw")
    predict = ("predict.py", "--device", "cpu", "--output", out / "seg.nii.gz", "--checkpoint")
    for command, words in (
        ((*predict, raw / "bad.pth", "--input", raw / "good.nii.gz"), "bad.pth"),
        ((*predict, raw / "good.pth", "--input", raw / "bad.nii.gz"), "bad.nii.gz"),
        ((*test, "--checkpoint", raw / "bad.pth", "--volume_path", raw / "h5"), "bad.pth"),
        ((*test, "--checkpoint", raw / "good.pth", "--volume_path", raw / "h5"), "h5/patient001_frame01.h5"),
        ((*test, "--checkpoint", raw / "good.pth", "--volume_path", raw / "link"), "link/patient001_frame01.h5"),
        ((*test, "--checkpoint", raw / "good.pth", "--volume_path", raw / "h5", "--split", "train"), "train.txt"),
        ((*test[:-1], raw / "lists", "--checkpoint", raw / "good.pth", "--volume_path", raw / "h5"), "../patient001"),
        (("train_acdc.py", "--resume", raw / "bad.pth"), "bad.pth"),
        (("train_acdc.py", "--resume", raw / "last.pth"), "last.pth"),
        ((prepare[0], "acdc", *prepare[1:], raw / "h5"), "h5/patient001_frame01.h5"),
        ((prepare[0], "acdc", *prepare[1:], raw / "nifti"), "patient001_frame01_gt.nii.gz"),
        ((prepare[0], "acdc", *prepare[1:], raw / "info"), "Info.cfg"),
        ((prepare[0], "segpc", *prepare[1:], raw / "segpc"), "1_1.bmp"),
        ((prepare[0], "isic", *prepare[1:], raw / "isic"), "images/1.jpg"),
    ):
        done = run_script(*command)
        errors = [line for line in done.error.splitlines() if "error:" in line]
        assert (done.status, len(errors)) == (1, 1) and "Traceback" not in done.error, done.error
        assert words in errors[0]
        assert everything_in(tmp_path) == before, command


def test_no_name_leads_out_of_the_output_folder(trained, tmp_path, run_script):
    names = ["../../evil", "/tmp/evil", "a\\..\\b"]
    scans, volumes = tmp_path / "in" / "scans", tmp_path / "in" / "volumes"
    scans.mkdir(parents=True)
    volumes.mkdir()
    state = torch.load(io.BytesIO(trained), weights_only=True)
    save_checkpoint(tmp_path / "in" / "best.pth", state | {"data": PLAIN | {"class_names": names}})
    for name in ("..", "\\..\\b", "\x1b[2J\n$(x)"):
        (scans / f"a{name}.nii.gz").write_bytes(gzip.compress(nifti(np.zeros((9, 8, 2), np.int16)), 1))
    volume = make_volume()
    volume.class_names = tuple(names)
    write_volume(volumes / "patient001_frame01.npy.h5", volume)
    (volumes / "test.txt").write_text("patient001\n")
    before = everything_in(tmp_path)
    common = ("--device", "cpu", "--overlays", 1, "--checkpoint", tmp_path / "in" / "best.pth")
    done = run_script("predict.py", *common, "--input", scans, "--output", tmp_path / "out" / "predicted")
    assert done.status == 0, done.error
    saving = ("--is_savenii", "--test_save_dir", tmp_path / "out" / "tested")
    done = run_script("test_acdc.py", *common, *saving, "--volume_path", volumes, "--list_dir", volumes)
    assert done.status == 0, done.error
    after = everything_in(tmp_path)
    assert before.items() <= after.items()
    new = {path.relative_to(tmp_path / "out").parts[0] for path in after.keys() - before.keys()}
    assert new == {"predicted", "tested"} and not Path("/tmp/evil").exists()


# What a judge must notice


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        ("exhaust", "MemoryError"),
        ("mistake", "KeyError"),
        ("mumble", "does not name the file"),
        ("hang", "more than 1 s"),
        ("crash", "status -11"),
    ],
)
def test_a_reader_that_fails_is_told(worker, tmp_path, reader, words):
    (tmp_path / "a.npz").touch()
    outcome = worker(reader, tmp_path / "a.npz", seconds=1.0 if reader == "hang" else 30.0)
    assert outcome.kind == "failed" and words in outcome.text
    assert reader != "crash" or worker("list", tmp_path / "none.txt").kind == "refused"  # and the next file is read
