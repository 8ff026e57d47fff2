"""Predict volumes and images with a network, score them against their labels, and write predictions to files."""

import logging
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets import Volume
from datasets.files import atomic_write, file_stem
from utils.errors import RunError
from utils.metrics import ClassResult, case_metrics, confusion


@dataclass(frozen=True)
class CaseResult:
    """The scores of one volume or image."""

    name: str
    unit: str  # of the strict distances: "mm" or "voxels", for an image "pixels"
    classes: tuple[ClassResult, ...]  # without background
    label: str = ""  # shape, voxel spacing and checksum of the label
    confusion: np.ndarray | None = None  # images only: (num_classes, num_classes), pixels by label and prediction


def predict_case(
    model: torch.nn.Module, volume: Volume, img_size: int, batch_size: int = 20,
    device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the class index of every voxel, uint8 (D, H, W), for a volume of D slices or an image (D = 1).

    Slices are resized to (img_size, img_size) and predicted ``batch_size`` at a time on ``device``, where the model is.
    The arg max of the summed logit maps is resized back. The model is put into evaluation mode. amp_dtype: type for
    autocast, or None for float32. Raises RunError if the largest logit of a pixel is not finite.
    """
    model.eval()
    if getattr(model, "config", {}).get("variant") == "release":
        batch_size = 1  # like the authors: in this variant, a prediction depends on the position in the batch
    device = torch.device(device)
    predictions = []
    with torch.inference_mode(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for start in range(0, len(volume.image), batch_size):
            slices = torch.from_numpy(volume.network_input(img_size, slice(start, start + batch_size)))
            maps = model(slices.to(device))
            maps = [maps] if isinstance(maps, torch.Tensor) else maps
            logits = sum(m.float() for m in maps)  # (B, num_classes, S, S)
            largest = logits.max(1)  # argmax is ten times slower on a CPU
            if not largest.values.isfinite().all():
                remedy = "use another checkpoint, or train with a lower --base_lr"
                if amp_dtype is not None:
                    remedy = "use --amp none (continue a training with --resume auto --amp none)"
                raise RunError(f"{volume.name}: the network's output is not finite: {remedy}")
            predictions.append(largest.indices.to("cpu", torch.uint8))
    return volume.restore(torch.cat(predictions).numpy())


def evaluate(
    predict: Callable[[Volume], np.ndarray], volumes: Sequence[Volume], num_classes: int,
    on_case: Callable[[Volume, np.ndarray], None] = lambda *_: None,
) -> list[CaseResult]:  # fmt: skip
    """Predict and score the volumes in order, log one line for each, and return the scores. Each is opened once.

    A volume is scored in another thread while the next one is predicted, so at most two are in memory. predict: returns
    the class index of every voxel, uint8 (D, H, W); num_classes: includes the background; on_case: called with a volume
    and its prediction after they are scored, for example to save them.
    """

    def score(number: int, volume: Volume, prediction: np.ndarray) -> CaseResult:
        if volume.planar:  # an image: distances are in 2D
            classes = case_metrics(prediction[0], volume.label[0], num_classes)
            unit, counts = "pixels", confusion(prediction, volume.label, num_classes)
        else:
            classes = case_metrics(prediction, volume.label, num_classes, volume.spacing)
            unit, counts = "voxels" if volume.spacing is None else "mm", None
        shape = " x ".join(map(str, volume.label.shape))
        label = f"{shape}, {volume.spacing}, {zlib.crc32(np.ascontiguousarray(volume.label)):08x}"
        result = CaseResult(volume.name, unit, classes, label, counts)
        dice = " ".join(f"{100 * c.strict.dice:.2f}" for c in classes)
        hd95 = " ".join(f"{c.strict.hd95:.2f}" for c in classes)
        text = "%d/%d %s: Dice %s %%, HD95 %s %s"
        logging.info(text, number, len(volumes), volume.name, dice, hd95, result.unit)
        on_case(volume, prediction)
        return result

    scores: list[Future[CaseResult]] = []
    with ThreadPoolExecutor(max_workers=1) as scorer:
        for i in range(len(volumes)):
            volume = volumes[i]
            prediction = predict(volume)
            if scores:
                scores[-1].result()  # waits, so that the previous volume is freed, and raises its error
            scores.append(scorer.submit(score, i + 1, volume, prediction))
    return [score.result() for score in scores]


def mean_dice(cases: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the mean Dice over classes, and the mean over cases of each class, (num_classes - 1,); NaN is left out.

    cases: what ``dice_only`` returned for each volume.
    """
    per_class = np.ma.masked_invalid(np.stack(cases)).mean(0)
    return float(np.ma.filled(per_class.mean(), np.nan)), np.ma.filled(per_class, np.nan)


def save_nifti(folder: str | Path, prediction: np.ndarray, volume: Volume) -> list[Path]:
    """Write ``<case>_pred.nii.gz``, ``<case>_img.nii.gz`` and, with a label, ``<case>_gt.nii.gz``; return the paths.

    prediction: class indices, uint8 (D, H, W). All files get the affine, spacing and orientation of the file that the
    volume was read from. Label and prediction also get its number type if that is an integer type.
    """
    import nibabel

    image = np.stack([volume.plane(z) for z in range(len(volume.image))])  # the first channel
    arrays = {"pred": prediction.astype(np.uint8), "img": image.astype(np.float32)}
    if volume.label is not None:
        arrays["gt"] = volume.label.astype(np.uint8)
    paths = []
    for kind, array in arrays.items():
        paths.append(Path(folder) / f"{file_stem(volume.name)}_{kind}.nii.gz")
        with atomic_write(paths[-1]) as temporary:
            nibabel.save(volume.to_nifti(array), temporary)
    return paths
