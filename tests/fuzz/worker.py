"""Reads files that may be hostile, each in a process whose memory and time are bounded, and judges what came of it.

``Worker`` starts the process and gives it one file after another; ``python -m tests.fuzz.worker`` is the process. So a
crash, a hang and a want of memory are told of the file that caused them, and end nothing else.
"""

import contextlib
import faulthandler
import gzip
import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2**30
"""Bytes that a file may take, beyond what the process has after its imports."""
SECONDS = 30.0
"""Time that a file may take; the slowest of them takes about one second."""
NUM_CLASSES = 4


@dataclass(frozen=True)
class Outcome:
    """How a file was received.

    kind: ``refused`` (one line, naming the file), ``read`` (and found right) or ``failed`` (anything else); text: the
    error's; digest: of what was read.
    """

    kind: str
    text: str = ""
    digest: str = ""


class Worker:
    """A process that reads files; it is started when it is needed, and again after a file that ended it."""

    def __init__(self, folder: Path):
        self.log = folder / "worker.log"
        self.process: subprocess.Popen | None = None
        self.slowest = 0.0

    def __call__(self, reader: str, path: Path, seconds: float = SECONDS) -> Outcome:
        """Return how a reader (a key of ``READERS``) receives a file."""
        process = self.process or self._start()
        start = time.monotonic()
        process.stdin.write(json.dumps([reader, str(path)]).encode() + b"\n")
        process.stdin.flush()
        answered = select.select([process.stdout], [], [], seconds)[0]
        line = process.stdout.readline() if answered else b""
        self.slowest = max(self.slowest, time.monotonic() - start)
        if line:
            return Outcome(**json.loads(line))
        if not answered:
            process.send_signal(signal.SIGABRT)  # on which it writes where it was
        status, self.process = process.wait(), None
        how = f"ended the interpreter (status {status})" if answered else f"took more than {seconds:g} s"
        return Outcome("failed", f"{how}: {self.log.read_text(errors='replace')[-2000:]}")

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(60)
            self.process = None

    def _start(self) -> subprocess.Popen:
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker"], cwd=ROOT, env=os.environ | one_thread,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
            )  # fmt: skip
        ready = self.process.stdout.readline()
        assert ready == b"ready\n", f"the worker does not start: {self.log.read_text(errors='replace')}"
        return self.process


def read_a_slice(path: Path) -> list:
    from datasets import read_slice

    image, label = read_slice(path, NUM_CLASSES)
    assert_pair(image, label, 2)
    assert_as_declared(path, image, label)
    return [image, label]


def read_a_volume(path: Path) -> list:
    from datasets import read_volume
    from datasets.preprocessing import is_orientation

    volume = read_volume(path, NUM_CLASSES)
    assert_pair(volume.image, volume.label, 3)
    assert_as_declared(path, volume.image, volume.label)
    assert volume.spacing is None or (len(volume.spacing) == 3 and 0 < min(volume.spacing) <= max(volume.spacing) < 1e9)
    assert volume.affine is None or (volume.affine.shape == (4, 4) and np.linalg.inv(volume.affine).shape == (4, 4))
    assert all(type(name) is str and name.isprintable() for name in volume.class_names), volume.class_names
    assert volume.orientation is None or is_orientation(volume.orientation)
    volume.to_nifti(volume.label)
    facts = [volume.spacing, volume.class_names, volume.orientation, volume.stored_type]
    return [volume.image, volume.label, volume.affine, *facts]


def read_a_scan(path: Path) -> list:
    from datasets import Preprocessing, read_scan

    found = []
    for preprocessing in (Preprocessing(), Preprocessing("LAS", (-125.0, 275.0))):
        volume = read_scan(path, preprocessing)
        image = np.asarray(volume.image)
        assert image.dtype == np.float32 and np.isfinite(image).all() and 0 <= image.min() <= image.max() <= 1
        declared = nifti_shape(path)
        shape = image.shape if preprocessing.orientation is None else sorted(image.shape)
        assert tuple(shape) == (declared if preprocessing.orientation is None else tuple(sorted(declared)))
        segmentation = volume.to_nifti(np.zeros(image.shape, np.uint8))
        assert segmentation.shape == declared[::-1]
        found += [image, volume.affine, volume.spacing, volume.orientation, volume.stored_type]
    return found


def read_a_scan_label(path: Path) -> list:
    from datasets.preprocessing import Preprocessing, ScanImage
    from datasets.scan import read_scan_label
    from datasets.volumes import Volume

    image = ScanImage(np.zeros(nifti_shape(path), np.int16), 1, 0, Preprocessing())
    volume = Volume("a", image, affine=np.eye(4))
    label = read_scan_label(path, volume, NUM_CLASSES)
    assert label.shape == image.shape
    assert_label(label)
    return [label]


def read_an_image(path: Path) -> list:
    from datasets.image_preparation import is_prepared  # noqa: F401  (what preparation imports, too)
    from datasets.images import read_grey, read_picture, read_shrunk

    picture = read_picture(path)
    image = picture.image[0]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert sorted(image.shape[:2]) == sorted(declared_size(path))
    small, size = read_shrunk(path, 16)
    assert size == image.shape[:2] and small.dtype == np.uint8
    grey = read_grey(path)
    assert grey.dtype == np.uint8 and sorted(grey.shape) == sorted(image.shape[:2])
    assert np.isfinite(picture.network_input(32)).all()
    return [image, grey, small]


def read_a_mask(path: Path) -> list:
    from datasets.images import read_mask

    mask = read_mask(path, num_classes=NUM_CLASSES)
    assert mask.shape == declared_size(path)
    assert_label(mask)
    return [mask]


def read_a_list(path: Path) -> list:
    """Read a list, and choose by it among the files that lie in its folder's ``data``."""
    from datasets import DataError
    from datasets.image_sets import select_images
    from datasets.lists import read_list, select_files

    entries = read_list(path.parent, path.stem)
    assert len(set(entries)) == len(entries) > 0
    for entry in entries:
        assert type(entry) is str and entry == entry.strip() != "" and not set(entry) & set("/\\\0")
        assert (path.parent / entry).resolve().parent == path.parent.resolve() and not entry.startswith(".")
    found = []
    for choose in (select_files, select_images):
        arguments = (path.parent, path.stem, path.parent / "data")
        try:
            chosen = choose(*arguments) if choose is select_files else choose(arguments[2], *arguments[:2]).values()
        except DataError as error:
            assert_refusal(error, path)
            continue
        for file in chosen:
            file = file if isinstance(file, Path) else file[0]
            assert file.resolve().is_relative_to((path.parent / "data").resolve())
            found.append(file.name)
    return [entries, found]


def read_a_checkpoint(path: Path) -> list:
    """Read a checkpoint and build its network, of which ``StandIn`` has the parts that are looked at."""
    import torch

    from networks import load_release_state_dict
    from utils.checkpoint import build_network, load_checkpoint

    state = load_checkpoint(path)
    assert "release" in state or {"model", "network", "data"} <= state.keys()
    model = build_network(state, path, stand_in(), load_release_state_dict)
    weights = model.state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert all(type(name) is str and name.isprintable() for name in state.get("data", {}).get("class_names", ()))
    return [*(value.numpy() for value in weights.values()), sorted(map(str, model.config.items()))]


def read_a_predictor(path: Path) -> list:
    """Take a checkpoint up as ``predict.py`` does, with the whole network."""
    from utils.predictor import Predictor

    predictor = Predictor(path, device="cpu")
    config = predictor.model.config
    assert len(predictor.class_names) == config["num_classes"] - 1
    assert config["in_channels"] == (3 if predictor.planar else 1)
    return [predictor.class_names, sorted(map(str, config.items()))]


def crash(path: Path) -> list:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hang(path: Path) -> list:
    time.sleep(60)
    return []


def exhaust(path: Path) -> list:
    return [np.ones(MEMORY + 2**20, np.uint8)]


def mistake(path: Path) -> list:
    raise KeyError("image")


def mumble(path: Path) -> list:
    from datasets import DataError

    raise DataError("something is wrong somewhere")


READERS = {
    "slice": read_a_slice,
    "volume": read_a_volume,
    "scan": read_a_scan,
    "scan label": read_a_scan_label,
    "image": read_an_image,
    "mask": read_a_mask,
    "list": read_a_list,
    "checkpoint": read_a_checkpoint,
    "predictor": read_a_predictor,
    # What a worker has to notice:
    "crash": crash,
    "hang": hang,
    "exhaust": exhaust,
    "mistake": mistake,
    "mumble": mumble,
}


def stand_in():
    """Return a class that takes SimMPNet's arguments and has of its weights the memory banks and the last head."""
    from torch import nn

    from networks.dmwla import DMWLA

    class StandIn(nn.Module):
        def __init__(
            self, num_classes, in_channels=1, img_size=256, img_size_dmwla=224, model_scale="small", variant="paper",
            feature_dim=8, num_clusters=2, decoder_feature_dim=8, decoder_num_clusters=2, columns_per_cluster=4,
            warmup_iterations=2000,
        ):  # fmt: skip
            super().__init__()
            self.config = {k: v for k, v in locals().items() if isinstance(v, int | str)}
            bank = dict(columns_per_cluster=columns_per_cluster, warmup_iterations=warmup_iterations, variant=variant)
            self.dmwla_encoder = nn.Module()
            self.dmwla_encoder.stages = nn.ModuleList([nn.ModuleList([DMWLA(4, feature_dim, num_clusters, **bank)])])
            self.decoder = nn.Module()
            blocks = (DMWLA(4, decoder_feature_dim, decoder_num_clusters, **bank) for _ in range(4))
            self.decoder.dmwla = nn.ModuleList(blocks)
            self.heads = nn.ModuleList([nn.Conv2d(4, num_classes, 1)])

    return StandIn


def assert_pair(image: np.ndarray, label: np.ndarray, ndim: int) -> None:
    assert image.dtype == np.float32 and image.ndim == ndim and image.size and np.isfinite(image).all()
    assert label.shape == image.shape
    assert_label(label)


def assert_label(label: np.ndarray) -> None:
    assert label.dtype == np.uint8 and label.max() < NUM_CLASSES


def assert_as_declared(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    """Compare what was read with what numpy or h5py says that the file holds."""
    import h5py

    def same(found, declared) -> bool:
        return found.shape == declared.shape and np.array_equal(found, np.asarray(declared).astype(found.dtype))

    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            key = "image.npy" if "image" in file.files else "img.npy"
            assert same(image, file[key]) and same(label, file["label.npy"])
        return
    # HDF5 refuses a little more: settings of its filters that unpacking has no use for.
    with contextlib.suppress(OSError), h5py.File(path, "r") as file:
        assert same(image, file["image" if "image" in file else "img"][()]) and same(label, file["label"][()])


def nifti_shape(path: Path) -> tuple[int, ...]:
    """Return the shape, (z, y, x), that a NIfTI header declares, or one voxel where there is no header."""
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            with gzip.open(path) as stream:
                content = stream.read(600)
    except (OSError, EOFError, zlib.error):
        return 1, 1, 1
    for kind, size, at, width in (("i4", 348, 40, "i2"), ("i4", 540, 16, "i8")):
        for order in "<>":
            if len(content) >= size and np.frombuffer(content, order + kind, 1)[0] == size:
                shape = np.frombuffer(content, order + width, 4, at)[:0:-1]
                is_small = min(shape) > 0 and np.prod(shape, dtype=float) < 1e6
                return tuple(int(n) for n in shape) if is_small else (1, 1, 1)
    return 1, 1, 1


def declared_size(path: Path) -> tuple[int, int]:
    """Return the (H, W) that an image file declares."""
    from PIL import Image

    with Image.open(path) as file:
        return file.height, file.width


def assert_refusal(error: Exception, path: Path) -> None:
    """Accept an error of a kind that ``run_script`` turns into one line, if it is one line and names the file."""
    from datasets import DataError
    from networks import NetworkError
    from utils.errors import RunError

    if isinstance(error, RunError | DataError | NetworkError):
        text = str(error)
        assert text.isprintable() and len(text) < 1500, f"not one line that can be printed: {text!r}"
        assert str(path) in text or f"{path.parent}/data" in text, f"does not name the file: {text!r}"
    elif isinstance(error, OSError) and error.errno and error.filename:
        assert str(path.parent) in str(error.filename), f"does not name the file: {error!r}"
    else:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def digest_of(values: list) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr((value.shape, value.dtype)).encode() if isinstance(value, np.ndarray) else b"")
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def outcome_of(reader: str, path: Path) -> Outcome:
    import traceback

    before = sorted(path.parent.rglob("*"))
    try:
        try:
            outcome = Outcome("read", digest=digest_of(READERS[reader](path)))
        except AssertionError:
            raise
        except Exception as error:
            assert_refusal(error, path)
            outcome = Outcome("refused", str(error))
        assert sorted(path.parent.rglob("*")) == before, "reading has written files"
        return outcome
    except Exception:
        return Outcome("failed", traceback.format_exc()[-3000:])


def serve() -> None:
    """Answer every line of stdin, [reader, path], with a line on stdout, an ``Outcome``."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print
    faulthandler.enable()
    warnings.simplefilter("ignore")
    import nibabel  # noqa: F401
    from PIL import Image

    import datasets.image_sets  # noqa: F401
    import networks  # noqa: F401
    import predict  # noqa: F401

    Image.init()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        reader, path = json.loads(line)
        answers.write(json.dumps(vars(outcome_of(reader, Path(path)))).encode() + b"\n")


if __name__ == "__main__":
    serve()
