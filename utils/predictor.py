"""A trained network that segments scans or pictures, and the tables written with a segmentation.

The tables give the names and colours of the labels, and the size of each class.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import DATASETS, DataError, DatasetInfo, Volume
from datasets.dicom import choose
from datasets.files import write_text
from datasets.images import read_picture
from datasets.preprocessing import ColourPreprocessing, preprocessing_from_dict
from datasets.scan import Scan, read_scan
from utils.arguments import script_of
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import AMP_DTYPES, pick_device, set_precision
from utils.errors import RunError
from utils.evaluation import predict_case
from utils.figures import class_rgb
from utils.onnx_network import OnnxNetwork, is_onnx
from utils.watch import known_errors

logger = logging.getLogger(__name__)


class Predictor:
    """A trained network with the preprocessing that its checkpoint describes.

    Args:
        checkpoint: best.pth of a run, an ONNX file of ``export.py``, or a checkpoint of the release.
        device, amp, batch_size: as the flags of ``predict.py``; with an ONNX file, amp must be ``none``.
        info: data set of a checkpoint of the release, such as ``DATASETS["acdc"]``; other checkpoints name theirs.
        prediction: as in ``SimMPNet``; None means as in training, and is required for an ONNX file.

    Attributes:
        model, device: the network, and the device where its input must be.
        class_names: names of label ids 1, 2, ...
        planar: whether the network takes images, not scans.
        preprocessing, channels: how a scan or image is prepared, and the names of its channels.
        data, origin: what the checkpoint stores about its training data, and about the training itself.

    Raises RunError if the checkpoint is missing or damaged, or does not fit the other arguments.
    """

    def __init__(
        self, checkpoint: str | Path, device: str = "auto", amp: str = "none", batch_size: int = 20,
        info: DatasetInfo | None = None, prediction: str | None = None,
    ):  # fmt: skip
        self.batch_size, self.amp_dtype = batch_size, AMP_DTYPES[amp]
        if is_onnx(checkpoint):
            if amp != "none":
                raise RunError(f"--amp {amp}: {checkpoint} computes in float32 only: leave out --amp")
            if prediction is not None:
                raise RunError(f"--prediction {prediction}: {checkpoint} has a fixed prediction: leave it out")
            self.model = OnnxNetwork(checkpoint, device)
            self.device = torch.device("cpu")
            state: dict[str, Any] = self.model.metadata["checkpoint"] | {"data": self.model.metadata}
        else:
            self.device = pick_device(device)
            set_precision(amp, self.device)
            state = load_checkpoint(checkpoint)
        if "data" not in state:
            if info is None:
                raise RunError(f"{checkpoint} does not store how scans are prepared: give its data set with --dataset")
            # The authors chose the checkpoints of the release on the test volumes.
            state["data"] = {"dataset": info.name, "channels": info.channels, "selected_on": "test"}
        self.data = data = state["data"]
        if info is not None and data.get("dataset") != info.name:
            raise RunError(
                f"{checkpoint} was trained on {data.get('dataset')}, not on {info.name}: test it with "
                f"{script_of('test', data.get('dataset'))} (with its --volume_path or --root_path and "
                "--list_dir for other cases), or name no data set"
            )
        info = info or DATASETS.get(data.get("dataset"))
        if "preprocessing" not in data and info:  # made by the release or by our first versions
            data["preprocessing"] = info.preprocessing.to_dict()
        try:
            self.preprocessing = preprocessing_from_dict(data.get("preprocessing"))
        except DataError as error:
            raise RunError(f"{checkpoint}: {error}: copy it again, or train again") from error
        self.planar = isinstance(self.preprocessing, ColourPreprocessing)
        channels = 3 if self.planar else self.preprocessing.channels
        if not is_onnx(checkpoint):
            self.model = build_network(state, checkpoint, channels, prediction).to(self.device)
        known = ("epoch", "iteration", "git", "versions", "args", "described", "seen")
        self.origin = {name: state[name] for name in known if name in state}
        self.channels = tuple(data.get("channels", ("image",) * channels))
        if "class_names" not in data:
            data["class_names"] = info.names_for(self.model.config["num_classes"])
        self.class_names = tuple(data["class_names"])

    def read(self, path: str | Path, time_point: int | None = None) -> Volume:
        """Open a scan or an image for the network. time_point: index, from 0, if a scan has several volumes."""
        if self.planar:
            choose(Path(path), 1, time_point, "image")
            return read_picture(path, class_names=self.class_names, preprocessing=self.preprocessing)
        volume = read_scan(path, self.preprocessing, time_point)
        volume.class_names = self.class_names
        if self.preprocessing.orientation is None and isinstance(volume, Scan) and volume.spacing:
            *_, second, coarsest = sorted(volume.spacing)
            if coarsest > 1.5 * second and coarsest != volume.spacing[0]:
                axis = "second" if coarsest == volume.spacing[1] else "first"
                logger.warning(
                    "%s: the network segments slices across the file's third axis (%.3g mm), but its %s axis looks "
                    "like the slice axis (%.3g mm): store the slices along the third axis",
                    path, volume.spacing[0], axis, coarsest,
                )  # fmt: skip
        return volume

    def segment(self, volume: Volume) -> np.ndarray:
        """Return the class index of every voxel, uint8 (D, H, W); for an image, D = 1."""
        size = self.model.config["img_size"]
        with known_errors(f"predict fewer than {self.batch_size} slices at a time, use bf16, or use the CPU"):
            return predict_case(self.model, volume, size, self.batch_size, self.device, self.amp_dtype)

    def __call__(self, path: str | Path):
        """Segment a file; return a nibabel image on the grid of the scan, or for a picture an array, uint8 (H, W)."""
        volume = self.read(path)
        prediction = self.segment(volume)
        return prediction[0] if self.planar else volume.to_nifti(prediction)


def write_colour_tables(stem: str | Path, class_names: Sequence[str]) -> None:
    """Write names and colours of label ids: ``<stem>labels.ctbl`` (3D Slicer) and ``<stem>labels_itksnap.txt``.

    The colours are those of the overlays; background (0) is transparent.
    Source: the user guides of 3D Slicer (colour table format) and of ITK-SNAP (label description format).
    """
    slicer = ["# Color table file", f"# {len(class_names) + 1} values"]
    itksnap = ["# ITK-SnAP Label Description File", "# IDX -R- -G- -B- -A- VIS MSH LABEL"]
    for c, name in enumerate(("background", *class_names)):
        red, green, blue = class_rgb(c) if c else (0, 0, 0)
        shown = int(c > 0)
        slicer.append(f"{c} {name.replace(' ', '_')} {red} {green} {blue} {255 * shown}")
        quoted = name.replace('"', "'")
        itksnap.append(f'{c:5} {red:5} {green:4} {blue:4} {shown:8} {shown:2} {shown:2}    "{quoted}"')
    for ending, lines in (("labels.ctbl", slicer), ("labels_itksnap.txt", itksnap)):
        write_text(f"{stem}{ending}", "\n".join(lines) + "\n")


def class_sizes(volume: Volume, prediction: np.ndarray) -> list[dict[str, Any]]:
    """Return the size of every class except background, one row each.

    prediction: class indices (D, H, W). For a scan, the size is in voxels and in millilitres (NaN if its file gives no
    voxel size); for an image, it is in pixels and as a share of the image.
    """
    # Plane by plane, because bincount takes 8 bytes per voxel.
    counts = sum(np.bincount(plane.ravel(), minlength=len(volume.class_names) + 1) for plane in prediction)[1:]
    rows = zip(volume.class_names, counts.tolist(), strict=True)
    if volume.planar:
        return [{"image": volume.name, "class": c, "pixels": n, "share": n / prediction.size} for c, n in rows]
    known = volume.spacing is not None and volume.affine is not None
    millilitres = abs(np.linalg.det(volume.affine[:3, :3])) / 1000 if known else np.nan
    return [{"scan": volume.name, "class": c, "voxels": n, "millilitres": n * millilitres} for c, n in rows]
