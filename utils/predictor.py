"""A trained network that segments scans or photographs, and what accompanies a segmentation.

The colours and names of its labels, and how large each organ is.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datasets import (
    DATASETS,
    ColourPreprocessing,
    DataError,
    Picture,
    Volume,
    preprocessing_from_dict,
    read_picture,
    read_scan,
)
from datasets.files import atomic_write
from networks import build, load_release_state_dict
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import AMP_DTYPES, pick_device, set_precision
from utils.errors import RunError
from utils.evaluation import predict_volume
from utils.exported import is_export, open_export
from utils.figures import class_rgb
from utils.watch import out_of_memory

Row = tuple[str, str, int, float]
"""Scan or image, class, voxels or pixels, and what these are: millilitres, or the share of the image."""


class Predictor:
    """A trained network with the preprocessing that its checkpoint names.

    checkpoint: best.pth of a run, one of the release with ``dataset``, the name of the data set it was trained on, or
    an export (.onnx, .pt2); device: auto, cpu, cuda or cuda:1; amp: none, bf16 or fp16, of an export none; batch_size:
    slices predicted at a time. ``class_names`` are those of label ids 1, 2, ...; ``planar`` says whether it takes
    images, not scans; ``dataset`` is what it was trained on, ``origin`` when and by what, ``history`` the epochs of
    its training, as far as the checkpoint says so. Raises RunError, DataError or NetworkError for a checkpoint that is
    unfit.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        amp: str = "none",
        batch_size: int = 20,
        dataset: str | None = None,
    ):
        exported = open_export(checkpoint, device, amp) if is_export(checkpoint) else None
        state = load_checkpoint(checkpoint) if exported is None else {"data": exported.metadata}
        data = state.get("data", {})
        if dataset is not None and data.get("dataset", dataset) != dataset:
            raise RunError(f"{checkpoint} was trained on {data['dataset']}, not on {dataset}: leave out --dataset")
        facts = DATASETS.get(dataset or data.get("dataset"))
        if "preprocessing" in data:
            try:
                self.preprocessing = preprocessing_from_dict(data["preprocessing"])
            except DataError as error:
                raise RunError(f"{checkpoint}: {error}") from error
        elif facts is not None:
            self.preprocessing = facts.preprocessing
        else:
            raise RunError(f"{checkpoint} does not say how scans are prepared for it: give --dataset")
        self.planar = isinstance(self.preprocessing, ColourPreprocessing)
        set_precision(amp)
        self.amp_dtype, self.batch_size = AMP_DTYPES[amp], batch_size
        channels = 3 if self.planar else 1
        if exported is None:
            self.device = pick_device(device)
            self.model = build_network(state, checkpoint, build, load_release_state_dict, channels).to(self.device)
            self.origin = {name: state[name] for name in ("epoch", "iteration", "git", "versions") if name in state}
            self.history = state.get("history", [])
        else:
            self.device, self.model, self.origin = exported.device, exported, exported.metadata["checkpoint"]
            self.history = []
        self.dataset = dataset or data.get("dataset")
        num_classes, takes = self.model.config["num_classes"], self.model.config["in_channels"]
        self.class_names = tuple(data["class_names"] if data else facts.names_for(num_classes))
        if (num_classes, takes) != (len(self.class_names) + 1, channels):
            raise RunError(
                f"{checkpoint}: its network has {num_classes} classes with background and takes {takes} channels, its "
                f"data have {len(self.class_names) + 1} and {channels}: copy it again, or train anew"
            )

    def read(self, path: str | Path) -> Volume | Picture:
        """Open a scan (a NIfTI file or the folder of a DICOM series) or an image, as the network is to see it."""
        if self.planar:
            return read_picture(path, class_names=self.class_names, preprocessing=self.preprocessing)
        volume = read_scan(path, self.preprocessing)
        volume.class_names = self.class_names
        return volume

    def segment(self, volume: Volume | Picture) -> np.ndarray:
        """Return the class of every voxel of what was read, uint8 (D, H, W), D being 1 of an image."""
        size = self.model.config["img_size"]
        with out_of_memory(f"--batch_size {self.batch_size} is too much for it; lower it, or use --amp bf16"):
            return predict_volume(self.model, volume, size, self.batch_size, self.device, self.amp_dtype)

    def __call__(self, path: str | Path):
        """Segment a scan, to a nibabel image that lies where the scan does, or an image, to uint8 (H, W)."""
        volume = self.read(path)
        prediction = self.segment(volume)
        return prediction[0] if self.planar else volume.to_nifti(prediction)


def write_colour_tables(stem: str | Path, class_names: Sequence[str]) -> list[Path]:
    """Write names and colours of the label ids as `<stem>labels.ctbl` for 3D Slicer, `<stem>labels_itksnap.txt`.

    Colours are those of the overlays; background (0) is transparent. Gives the paths.
    Source: the colour table format of Slicer's user guide, the label description format of ITK-SNAP's.
    """
    entries = [(0, "background", (0, 0, 0))]
    entries += [(c, name, class_rgb(c)) for c, name in enumerate(class_names, 1)]
    slicer = ["# Color table file", f"# {len(entries)} values"]
    slicer += [f"{c} {name.replace(' ', '_')} {r} {g} {b} {255 if c else 0}" for c, name, (r, g, b) in entries]
    itksnap = ["# ITK-SnAP Label Description File", "# IDX -R- -G- -B- -A- VIS MSH LABEL"]
    for c, name, (r, g, b) in entries:
        seen = int(c > 0)
        quoted = name.replace('"', "'")
        itksnap.append(f'{c:5} {r:5} {g:4} {b:4} {seen:8} {seen:2} {seen:2}    "{quoted}"')
    paths = []
    for ending, lines in (("labels.ctbl", slicer), ("labels_itksnap.txt", itksnap)):
        paths.append(Path(f"{stem}{ending}"))
        with atomic_write(paths[-1]) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def organ_volumes(
    name: str, prediction: np.ndarray, class_names: Sequence[str], affine: np.ndarray | None
) -> list[Row]:
    """Give (scan, class, voxels, millilitres) for every class but the background; NaN ml without an affine.

    prediction: class indices (D, H, W); affine: (4, 4), voxel index to mm.
    """
    millilitres = np.nan if affine is None else abs(np.linalg.det(affine[:3, :3])) / 1000
    return [(name, c, n, n * millilitres) for c, n in _counts(prediction, class_names)]


def picture_areas(name: str, prediction: np.ndarray, class_names: Sequence[str]) -> list[Row]:
    """Give (image, class, pixels, share of the image) for every class but the background.

    prediction: class indices (H, W).
    """
    return [(name, c, n, n / prediction.size) for c, n in _counts(prediction, class_names)]


def write_report(path: str | Path, header: Sequence[str], rows: Iterable[Row]) -> None:
    """Write the rows of `organ_volumes` or `picture_areas` as CSV; NaN is an empty cell."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows((name, c, n, "" if np.isnan(x) else f"{x:.6f}") for name, c, n, x in rows)


def _counts(prediction: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, int]]:
    # Plane by plane, since bincount makes 8 bytes of every voxel.
    counts = sum(np.bincount(plane.ravel(), minlength=len(class_names) + 1) for plane in prediction)[1:]
    return list(zip(class_names, counts.tolist(), strict=True))
