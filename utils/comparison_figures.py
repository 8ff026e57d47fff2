"""Draw several methods side by side: their scores, their training and their predictions."""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from datasets import DATASETS, DataError, Picture, Volume, VolumeDataset
from datasets.image_sets import ImageFolder, images_of
from utils.comparison import MEAN, NAMES, TESTED, Comparison, Method
from utils.figures import class_legend, grey_limits, pixel_aspect, save_figure, show_slice, upright_steps
from utils.metrics import dice_only
from utils.predictor import Predictor

as_text = rc_context({"text.parse_math": False})
"""A `$` in a name is not a formula."""


@dataclass(frozen=True)
class Drawing:
    """A PNG file and its caption."""

    path: Path
    caption: str

    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Example:
    """One slice the right way up. image: (H, W) or uint8 (H, W, 3); masks: class indices (H, W), the label first."""

    title: str
    image: np.ndarray
    limits: tuple[float, float]
    aspect: float
    masks: Mapping[str, np.ndarray]


@as_text
def draw_box_plots(path: Path, comparison: Comparison) -> Drawing:
    """Draw the strict Dice and HD95 of each class as boxes, one per method, and the cases as dots."""
    values = comparison.per_case().dropna()
    values = values[(values["convention"] == "strict") & (values["class"] != MEAN)]
    units = comparison.units().query("convention == 'strict'").set_index("metric")["unit"]
    colours, classes = _colours(comparison.methods), list(comparison.class_names)
    figure = Figure(figsize=(min(20, 5 + 0.25 * len(classes) * len(colours)), 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 1), TESTED, strict=True):
        data = values[values["metric"] == metric]
        if len(data):
            style = dict(x="class", y="value", hue="method", order=classes, palette=colours, ax=axes, legend=False)
            style |= dict(hue_order=list(colours))
            seaborn.boxplot(data, **style, fill=False, fliersize=0)
            seaborn.stripplot(data, **style, dodge=True, size=3, alpha=0.5)
        axes.set(xlabel="", ylabel=f"{NAMES[metric]} [{units[metric]}]")
    _legend(figure, colours)
    save_figure(figure, path)
    return Drawing(
        path,
        f"{comparison.title}: Dice and HD95 of each class, strict convention, seeds averaged first. Boxes are "
        "quartiles and median, whiskers reach the last case within 1.5 box heights, dots are cases.",
    )


@as_text
def draw_curves(path: Path, methods: Sequence[Method]) -> list[Drawing]:
    """Draw training loss and validation Dice over the epochs, one line per run; return [] without any `metrics.csv`."""
    runs = [
        run.history.assign(method=m.name, run=str(run.folder)) for m in methods for run in m.runs if len(run.history)
    ]
    if not runs:
        return []
    history = pd.concat(runs, ignore_index=True).reindex(columns=["method", "run", "epoch", "train_loss", "val_dice"])
    colours, figure = _colours([method.name for method in methods]), Figure(figsize=(10, 4.5), layout="constrained")
    labels = {"train_loss": "training loss", "val_dice": "Dice on which the best epoch is chosen, in [0, 1]"}
    for axes, (column, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        data = history[["method", "run", "epoch", column]].dropna()
        style = dict(hue="method", palette=colours, units="run", estimator=None, marker=".", legend=False)
        seaborn.lineplot(data, x="epoch", y=column, **style, ax=axes)
        axes.set(ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(figure, colours)
    save_figure(figure, path)
    caption = (
        "Training, one line per run. Losses are comparable only between methods that are trained with the same loss."
    )
    return [Drawing(path, caption)]


def example(volume: Volume | Picture, predictions: Mapping[str, np.ndarray]) -> Example:
    """Choose the slice on which the methods' errors differ most, at a tie that with most label, and cut it out.

    predictions: class indices (D, H, W) by method.
    """
    wrong = np.array([(p != volume.label).sum((1, 2)) for p in predictions.values()])  # (methods, D)
    z = int(np.lexsort((-(volume.label > 0).sum((1, 2)), wrong.min(0) - wrong.max(0)))[0])
    masks = {"label": volume.label[z], **{name: p[z] for name, p in predictions.items()}}
    rows, columns = np.nonzero(np.any([mask > 0 for mask in masks.values()], axis=0))
    box = slice(None), slice(None)
    if len(rows):
        margin = max(volume.label.shape[1:]) // 8
        box = tuple(slice(max(0, i.min() - margin), i.max() + 1 + margin) for i in (rows, columns))
    steps = upright_steps(volume)
    title = volume.name if volume.planar else f"{volume.name}, slice {z}"
    masks = {name: mask[box][steps] for name, mask in masks.items()}
    return Example(title, volume.image[z][box][steps], grey_limits(volume), pixel_aspect(volume), masks)


def open_volumes(
    comparison: Comparison, volume_path: Path | None, list_dir: Path | None
) -> ImageFolder | VolumeDataset:
    """Open the volumes or images of a comparison, by default where its first run has them; raises DataError."""
    info, trained = DATASETS[comparison.dataset], next(iter(comparison.methods.values())).runs[0].args
    folder = volume_path or trained.get("root_path" if info.planar else "volume_path") or info.volume_path
    list_dir, num_classes = list_dir or trained.get("list_dir", info.list_dir), len(comparison.class_names) + 1
    if info.planar:
        return images_of(info, folder, list_dir, comparison.split, num_classes)
    info.require(folder)
    order = info.label_order(trained.get("label_order"), num_classes)
    return VolumeDataset(folder, list_dir, comparison.split, num_classes, order)


@as_text
def draw_predictions(
    path: Path,
    comparison: Comparison,
    volumes: ImageFolder | VolumeDataset,
    cases: Sequence[str],
    predictors: Mapping[str, Predictor],
) -> Drawing:
    """Draw one case per row: the image, its label, and each method's prediction with its strict Dice in the slice.

    Raises DataError for a case that is not in the volumes.
    """
    examples = []
    for case in cases:
        if case not in volumes.names:
            raise DataError(f"{volumes.source} has no {case}: give the list that was tested with --list_dir")
        volume = volumes[volumes.names.index(case)]
        examples.append(example(volume, {name: p.segment(volume) for name, p in predictors.items()}))
    columns = 2 + len(predictors)
    figure = Figure(figsize=(2.3 * columns, 2.6 * len(examples) + 1), layout="constrained")
    for row, shown in zip(figure.subplots(len(examples), columns, squeeze=False), examples, strict=True):
        for axes, (name, mask) in zip(row, {"image": None, **shown.masks}.items(), strict=True):
            show_slice(axes, shown.image, mask, shown.limits, shown.aspect)
            if name in predictors:
                dice = dice_only(mask, shown.masks["label"], len(comparison.class_names) + 1)
                axes.set_xlabel("absent" if np.isnan(dice).all() else f"Dice {100 * np.nanmean(dice):.1f} %")
            if shown is examples[0]:
                axes.set_title(textwrap.fill(name, 22), fontsize=9)
        row[0].set_ylabel(textwrap.fill(shown.title, 30), fontsize=8)
    class_legend(figure, comparison.class_names)
    save_figure(figure, path)
    return Drawing(
        path,
        f"Image, label and the predictions of each method's first seed on {', '.join(cases)}. Of a volume, the slice "
        "is shown on which the methods' errors differ most, cut out around label and predictions. Dice is the mean "
        "over the classes in this slice.",
    )


def _colours(methods: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    palette = seaborn.color_palette("colorblind" if len(methods) <= 10 else "husl", len(methods))
    return dict(zip(methods, palette, strict=True))


def _legend(figure: Figure, colours: Mapping[str, tuple[float, float, float]]) -> None:
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
