"""From a model and labelled volumes to predictions, scores, their means, tables and files."""

import csv
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from datasets.files import atomic_write, file_stem
from utils.errors import RunError
from utils.metrics import (
    ABSENT,
    ISIC_THRESHOLD,
    MISSED,
    SPURIOUS,
    ClassResult,
    Metrics,
    PooledMetrics,
    case_metrics,
    confusion,
    dice_only,
    pooled_metrics,
    thresholded_jaccard,
)

CONVENTIONS = {
    "transunet": "as papers report: spurious counts as Dice 100, missed as 0, both at distance 0",
    "strict": "spurious and missed count as Dice 0 at the volume's diagonal, absent is left out",
}
STATES = (MISSED, SPURIOUS, ABSENT)
OPTIMISTIC = (
    "The checkpoint was chosen on the test volumes (--select test): optimistic, comparable only with others so chosen."
)
"""Heads every table of such a checkpoint."""


class Volume(Protocol):
    """What this room asks of a volume; `datasets.Volume` has it.

    image: float32 (D, H, W). label: uint8 (D, H, W) or None. spacing: mm along (z, y, x) or None. affine:
    float64 (4, 4) from indices (x, y, z) to mm, or None. class_names: without the background.
    network_input gives float32 (n, 1, S, S) of n slices; restore takes uint8 (D, S, S) to uint8 (D, H, W);
    to_nifti gives a nibabel image of an array (D, H, W), lying as the file that the volume came from.
    An image is a volume of one slice that is `planar`: image uint8 (1, H, W, 3), distances in two dimensions; it has
    no to_nifti.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None
    class_names: tuple[str, ...]
    planar: bool

    def network_input(self, img_size: int, part: slice) -> np.ndarray: ...

    def restore(self, prediction: np.ndarray) -> np.ndarray: ...

    def to_nifti(self, array: np.ndarray): ...


@dataclass(frozen=True)
class CaseResult:
    """The scores of one volume: one result per class without background, strict distances in `unit`.

    Of an image (unit pixels) also its confusion, (num_classes, num_classes).
    """

    name: str
    unit: str
    classes: tuple[ClassResult, ...]
    confusion: np.ndarray | None = None


@dataclass(frozen=True)
class Means:
    """Means over cases, per class and over classes, under one convention; distances in `unit`."""

    unit: str
    classes: tuple[Metrics, ...]
    mean: Metrics


@dataclass(frozen=True)
class Summary:
    """The means of many cases under both conventions; in how many a class was missed, spurious or absent.

    Of images also, per class, the mean of the ISIC challenge's thresholded Jaccard (strict), and the scores over all
    pixels together.
    """

    num_cases: int
    transunet: Means
    strict: Means
    missed: tuple[int, ...]
    spurious: tuple[int, ...]
    absent: tuple[int, ...]
    thresholded: tuple[float, ...] = ()
    pooled: tuple[PooledMetrics, ...] = ()


def predict_volume(
    model: torch.nn.Module,
    volume: Volume,
    img_size: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Predict the class of every voxel: slices to S x S, arg max of the summed logit maps, and back.

    Gives uint8 (D, H, W). The model must be on `device`; it predicts in evaluation mode and leaves in the
    mode it came in. `batch_size` slices go through at a time, under autocast if `amp_dtype` is given.
    """
    device = torch.device(device)
    amp = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    predictions = []
    with _evaluation_mode(model), torch.inference_mode(), amp:
        for start in range(0, len(volume.image), batch_size):
            slices = torch.from_numpy(volume.network_input(img_size, slice(start, start + batch_size)))
            logits = sum(m.float() for m in model(slices.to(device)))  # (B, num_classes, S, S)
            predictions.append(logits.max(1).indices.to("cpu", torch.uint8))  # argmax is ten times slower on a CPU
    return volume.restore(torch.cat(predictions).numpy())


def evaluate(
    model: torch.nn.Module,
    volumes: Sequence[Volume],
    num_classes: int,
    img_size: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    on_case: Callable[[Volume, np.ndarray], None] | None = None,
) -> list[CaseResult]:
    """Predict and score every volume, with a line in the log for each.

    One volume is in memory at a time, and the label and prediction of the one before, which is scored on another
    thread meanwhile. `on_case(volume, prediction)` is called after the scoring, to save pictures or files; with it,
    the whole volume before is kept too. The other arguments are those of `predict_volume`. Raises RunError if there
    is no volume or one has no label.
    """
    _check_count(volumes)

    def score(number: int, case: tuple, seconds: float, prediction: np.ndarray, volume: Volume | None) -> CaseResult:
        start = time.perf_counter()
        name, label, spacing, planar = case
        if planar:
            classes = case_metrics(prediction[0], label[0], num_classes)
            result = CaseResult(name, "pixels", classes, confusion(prediction, label, num_classes))
        else:
            unit = "voxels" if spacing is None else "mm"
            result = CaseResult(name, unit, case_metrics(prediction, label, num_classes, spacing))
        _log_case(result, number, len(volumes), seconds + time.perf_counter() - start)
        if volume is not None:
            on_case(volume, prediction)
        return result

    scores: list[Future[CaseResult]] = []
    with ThreadPoolExecutor(max_workers=1) as scorer:
        for i in range(len(volumes)):
            start = time.perf_counter()
            volume = volumes[i]
            _check_label(volume)
            prediction = predict_volume(model, volume, img_size, batch_size, device, amp_dtype)
            seconds = time.perf_counter() - start
            if scores:
                scores[-1].result()  # waits, so that no third volume comes up, and raises what went wrong
            case = volume.name, volume.label, volume.spacing, volume.planar
            scores.append(scorer.submit(score, i + 1, case, seconds, prediction, on_case and volume))
            del volume, case, prediction
    return [score.result() for score in scores]


def case_dice(
    model: torch.nn.Module,
    volume: Volume,
    num_classes: int,
    img_size: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Predict a volume and give the strict Dice of each class, float64 (num_classes - 1,), without distances or log.

    The quick form of `evaluate` for use during training. In [0, 1], NaN for a class that neither label nor prediction
    has. Raises RunError as `evaluate` does.
    """
    _check_label(volume)
    prediction = predict_volume(model, volume, img_size, batch_size, device, amp_dtype)
    return dice_only(prediction, volume.label, num_classes)


def mean_dice(cases: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Give the mean over cases, then over classes, and that of each class, as the strict `Summary` has them.

    cases: what `case_dice` gave for each volume; NaN is left out. Raises RunError for none.
    """
    _check_count(cases)
    per_class = _mean(np.stack(cases))
    return float(_mean(per_class)), per_class


def summarise(results: Sequence[CaseResult]) -> Summary:
    """Average over cases, then over classes, under both conventions; NaN (absent, strict) is left out.

    Where some volumes have a voxel spacing and others have none, the strict unit says `mm or voxels`.
    """
    units = sorted({result.unit for result in results})

    def count(state: str) -> tuple[int, ...]:
        return tuple(
            sum(c.state == state for c in column) for column in zip(*(r.classes for r in results), strict=True)
        )

    planar = all(result.confusion is not None for result in results)
    summary = Summary(
        num_cases=len(results),
        transunet=_means("pixels" if planar else "voxels", [[c.transunet for c in r.classes] for r in results]),
        strict=_means(" or ".join(units), [[c.strict for c in r.classes] for r in results]),
        missed=count(MISSED),
        spurious=count(SPURIOUS),
        absent=count(ABSENT),
    )
    if not planar:
        return summary
    thresholded = _mean(np.array([[thresholded_jaccard(c.strict.jaccard) for c in r.classes] for r in results]))
    pooled = pooled_metrics(sum(result.confusion for result in results))
    return replace(summary, thresholded=tuple(thresholded.tolist()), pooled=pooled)


def format_table(summary: Summary, class_names: Sequence[str], selected_on: str = "val") -> str:
    """Lay out a summary as plain text, one aligned table per convention, Dice and Jaccard in percent.

    selected_on: the volumes that the checkpoint was chosen on, `val` or `test`; the latter is said above the tables.
    """
    names = _checked(class_names, summary)
    blocks = [OPTIMISTIC] if selected_on == "test" else []
    for convention, note in CONVENTIONS.items():
        means: Means = getattr(summary, convention)
        header = ["class", "Dice [%]", f"HD95 [{means.unit}]", "Jaccard [%]", f"ASSD [{means.unit}]"]
        rows = [[name, *_cells(m)] for name, m in zip(names, means.classes, strict=True)]
        rows.append(["mean", *_cells(means.mean)])
        if convention == "strict":
            for state in STATES:
                counts = getattr(summary, state)
                header.append(state)
                for row, count in zip(rows, [*counts, sum(counts)], strict=True):
                    row.append(str(count))
            if summary.thresholded:
                header.append(f"Jaccard, 0 below {ISIC_THRESHOLD} [%]")
                column = [*summary.thresholded, float(_mean(np.array(summary.thresholded)))]
                for row, value in zip(rows, column, strict=True):
                    row.append(_percent(value))
        title = f"{convention} convention, {summary.num_cases} cases ({note})"
        blocks.append("\n".join([title, *_align([header, *rows])]))
    if summary.pooled:
        header = ["class", *(f"{field.capitalize()} [%]" for field in PooledMetrics._fields)]
        mean = _mean(np.array(summary.pooled))
        rows = [[n, *map(_percent, v)] for n, v in zip([*names, "mean"], [*summary.pooled, mean], strict=True)]
        blocks.append("\n".join(["over the pixels of all cases together", *_align([header, *rows])]))
    return "\n\n".join(blocks)


def write_case_csv(
    path: str | Path, results: Sequence[CaseResult], class_names: Sequence[str], selected_on: str = "val"
) -> None:
    """Write one row per case and class: its state and four numbers per convention, in [0, 1], voxels or mm.

    A number that a convention leaves out is an empty cell; `strict_unit` is the unit of the strict distances,
    `selected_on` the volumes that the checkpoint was chosen on.
    """
    names = _checked(class_names, summarise(results))
    fields = [f"{convention}_{field}" for convention in CONVENTIONS for field in Metrics._fields]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "class", "state", *fields, "strict_unit", "selected_on"])
        for result in results:
            for name, c in zip(names, result.classes, strict=True):
                numbers = ["" if np.isnan(x) else f"{x:.6f}" for x in (*c.transunet, *c.strict)]
                writer.writerow([result.name, name, c.state, *numbers, result.unit, selected_on])


def read_case_csv(path: str | Path) -> tuple[list[CaseResult], list[str], str]:
    """Read what `write_case_csv` wrote: the results, the class names, and what the checkpoint was chosen on.

    Numbers have the file's six digits; the confusion of images is not in it. Raises RunError for another file, or one
    that is cut off.
    """
    cases: dict[str, dict[str, tuple[ClassResult, str]]] = {}
    selected_on = "val"
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row.values():
                    raise ValueError("too few cells")
                metrics = [Metrics(*(read_number(row[f"{c}_{f}"]) for f in Metrics._fields)) for c in CONVENTIONS]
                result, selected_on = ClassResult(row["state"], *metrics), row["selected_on"]
                cases.setdefault(row["case"], {})[row["class"]] = result, row["strict_unit"]
        except (KeyError, ValueError, csv.Error) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else error
            raise RunError(
                f"{path}, line {reader.line_num}: {what}; expected what a test script writes: test the checkpoint again"
            ) from error
    class_names = list(next(iter(cases.values()), {}))
    for name, classes in cases.items():
        if list(classes) != class_names:
            raise RunError(f"{path}: {name} has not every class, the file is cut off: test the checkpoint again")
    if not cases:
        raise RunError(f"{path}: no case in it; expected what a test script writes: test the checkpoint again")
    results = []
    for name, classes in cases.items():
        values, units = zip(*classes.values(), strict=True)
        results.append(CaseResult(name, units[0], values))
    return results, class_names, selected_on


def write_summary_json(
    path: str | Path, summary: Summary, class_names: Sequence[str], selected_on: str = "val"
) -> None:
    """Write a summary as JSON: per convention its unit, the mean and a list of classes; NaN becomes null."""
    names = _checked(class_names, summary)
    content: dict[str, object] = {"num_cases": summary.num_cases, "selected_on": selected_on}
    for convention in CONVENTIONS:
        means: Means = getattr(summary, convention)
        classes = [{"class": n, **_numbers(m)} for n, m in zip(names, means.classes, strict=True)]
        content[convention] = {"unit": means.unit, "mean": _numbers(means.mean), "classes": classes}
    for state in STATES:
        content[state] = [{"class": n, "cases": count} for n, count in zip(names, getattr(summary, state), strict=True)]
    if summary.pooled:
        content["thresholded_jaccard"] = [
            {"class": n, "mean": None if np.isnan(x) else x} for n, x in zip(names, summary.thresholded, strict=True)
        ]
        content["pooled"] = [{"class": n, **_numbers(m)} for n, m in zip(names, summary.pooled, strict=True)]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_nifti(folder: str | Path, prediction: np.ndarray, volume: Volume) -> list[Path]:
    """Write `<case>_pred.nii.gz`, `<case>_img.nii.gz` and, with a label, `<case>_gt.nii.gz` into `folder`.

    prediction: class indices (D, H, W), uint8. All lie as the file that the volume came from: same affine, spacing
    and orientation, and class indices in its number type where that is one of integers. Gives the paths.
    """
    import nibabel

    arrays = {"pred": prediction.astype(np.uint8), "img": np.asarray(volume.image, dtype=np.float32)}
    if volume.label is not None:
        arrays["gt"] = volume.label.astype(np.uint8)
    paths = []
    for kind, array in arrays.items():
        paths.append(Path(folder) / f"{file_stem(volume.name)}_{kind}.nii.gz")
        with atomic_write(paths[-1]) as temporary:
            nibabel.save(volume.to_nifti(array), temporary)
    return paths


def save_mask(path: str | Path, prediction: np.ndarray) -> None:
    """Write class indices (H, W), uint8, as the grey values of a PNG."""
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(prediction).save(temporary)


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    # Module by module, because a part of the model may be held in evaluation mode during training.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_count(volumes: Sequence[Volume]) -> None:
    if len(volumes) == 0:
        raise RunError("no volume to evaluate: expected at least one in the list of cases")


def _check_label(volume: Volume) -> None:
    if volume.label is None:
        raise RunError(f"{volume.name}: the volume has no label to compare with")


def _log_case(result: CaseResult, number: int, total: int, seconds: float) -> None:
    cells = [_cells(c.strict) for c in result.classes]
    dice, hd95 = (" ".join(column) for column in list(zip(*cells, strict=True))[:2])
    where = f"{number}/{total} {result.name}"
    logging.info("%s: Dice %s %%, HD95 %s %s, %.1f s", where, dice, hd95, result.unit, seconds)


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over the first axis without the NaN; NaN where nothing is left."""
    there = ~np.isnan(values)
    n = there.sum(0)
    return np.divide(np.where(there, values, 0).sum(0), n, out=np.full(n.shape, np.nan), where=n > 0)


def _means(unit: str, metrics: Sequence[Sequence[Metrics]]) -> Means:
    classes = _mean(np.array(metrics))  # (classes, 4)
    return Means(unit, tuple(Metrics(*c) for c in classes.tolist()), Metrics(*_mean(classes).tolist()))


def _checked(class_names: Sequence[str], summary: Summary) -> Sequence[str]:
    if len(class_names) != len(summary.missed):
        raise RunError(
            f"{len(class_names)} class names ({', '.join(class_names)}) for {len(summary.missed)} classes: "
            "check --num_classes, which counts the background"
        )
    return class_names


def _numbers(metrics: Metrics | PooledMetrics) -> dict[str, float | None]:
    return {field: None if np.isnan(x) else x for field, x in metrics._asdict().items()}


def _cells(metrics: Metrics) -> list[str]:
    scales = Metrics(dice=100, hd95=1, jaccard=100, assd=1)
    return ["-" if np.isnan(x) else f"{s * x:.2f}" for s, x in zip(scales, metrics, strict=True)]


def read_number(cell: str) -> float:
    """Return the number of a cell of a table, NaN of an empty one."""
    return float(cell) if cell else float("nan")


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
