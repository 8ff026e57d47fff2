"""Draw several methods side by side: their scores, their training and their predictions; return the captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn
from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

from datasets import DATASETS, DataError, VolumeDataset
from datasets.image_sets import ImageFolder, images_of
from utils.comparison import NAMES, TESTED, Comparison, Run
from utils.figures import class_legend, grey_limits, pixel_aspect, save_figure, show_slice, upright_steps
from utils.metrics import dice_only
from utils.predictor import Predictor

# A `$` in a name is not a formula. From eleven methods on, seaborn takes other colours.
in_style = rc_context({"text.parse_math": False, "axes.prop_cycle": cycler(color=seaborn.color_palette("colorblind"))})


@in_style
def draw_box_plots(path: Path, comparison: Comparison) -> str:
    """Draw the strict Dice and HD95 of each class as boxes, one per method, and the cases as dots."""
    values = comparison.per_case().query("convention == 'strict' and `class` != 'mean'").dropna()
    units = comparison.cases.query("convention == 'strict'").groupby("metric")["unit"].first()
    classes, methods = list(comparison.class_names), list(comparison.methods)
    figure = Figure(figsize=(min(20, 5 + 0.25 * len(classes) * len(methods)), 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 1), TESTED, strict=True):
        data = values[values["metric"] == metric]
        if len(data):
            style = dict(x="class", y="value", hue="method", order=classes, hue_order=methods, ax=axes)
            seaborn.boxplot(data, **style, fill=False, fliersize=0)
            seaborn.stripplot(data, **style, dodge=True, size=3, alpha=0.5, legend=False)
        axes.set(xlabel="", ylabel=f"{NAMES[metric]} [{units[metric]}]")
    _save(figure, path)
    return (
        f"{comparison.title}: Dice and HD95 of each class, strict convention, seeds averaged first. Boxes are "
        "quartiles and median, whiskers reach the last case within 1.5 box heights, dots are cases."
    )


@in_style
def draw_curves(path: Path, runs: Sequence[Run]) -> str:
    """Draw training loss and validation Dice over the epochs, one line per run with a `metrics.csv`."""
    history = pd.concat([run.history.assign(method=run.method, run=str(run.folder)) for run in runs])
    history = history.reindex(columns=["method", "run", "epoch", "train_loss", "val_dice"])
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    labels = {"train_loss": "training loss", "val_dice": "Dice on which the best epoch is chosen, in [0, 1]"}
    for axes, (column, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        data = history.dropna(subset=["epoch", column])
        style = dict(hue="method", hue_order=list(dict.fromkeys(run.method for run in runs)), units="run", ax=axes)
        seaborn.lineplot(data, x="epoch", y=column, **style, estimator=None, marker=".")
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    _save(figure, path)
    return "Training, one line per run. Losses are comparable only between methods that are trained with the same loss."


def open_volumes(comparison: Comparison, volume_path: Path | None) -> ImageFolder | VolumeDataset:
    """Open the volumes or images of a comparison, by default where its first run has them; raises DataError."""
    info, trained = DATASETS[comparison.dataset], next(iter(comparison.methods.values()))[0].args
    folder = volume_path or trained.get("root_path" if info.planar else "volume_path") or info.volume_path
    list_dir, num_classes = trained.get("list_dir", info.list_dir), len(comparison.class_names) + 1
    if info.planar:
        return images_of(info, folder, list_dir, comparison.split, num_classes)
    info.require(folder)
    order = info.label_order(trained.get("label_order"), num_classes)
    return VolumeDataset(folder, list_dir, comparison.split, num_classes, order)


@in_style
def draw_predictions(
    path: Path,
    comparison: Comparison,
    volumes: ImageFolder | VolumeDataset,
    cases: Sequence[str],
    predictors: Mapping[str, Predictor],
) -> str:
    """Draw one case per row: the image, its label, and each method's prediction with its strict Dice in the slice.

    Raises DataError for a case that is not in the volumes.
    """
    titles = ["image", "label", *predictors]
    figure = Figure(figsize=(2.3 * len(titles), 2.6 * len(cases) + 1), layout="constrained")
    for row, case in zip(figure.subplots(len(cases), len(titles), squeeze=False), cases, strict=True):
        if case not in volumes.names:
            raise DataError(f"{volumes.source} has no {case}: leave out --cases, or test again on this list")
        volume = volumes[volumes.names.index(case)]
        predictions = np.array([predictor.segment(volume) for predictor in predictors.values()])
        wrong = (predictions != volume.label).sum((2, 3))  # (methods, D)
        # The slice in which the methods differ most; at a tie the one with most label.
        z = np.lexsort((-(volume.label > 0).sum((1, 2)), wrong.min(0) - wrong.max(0)))[0]
        steps = upright_steps(volume)
        for i, mask in enumerate([None, volume.label[z], *predictions[:, z]]):
            shown = None if mask is None else mask[steps]
            show_slice(row[i], volume.image[z][steps], shown, grey_limits(volume), pixel_aspect(volume))
            row[i].set_title(textwrap.fill(titles[i], 22), fontsize=9)
            if i > 1:
                dice = dice_only(mask, volume.label[z], len(comparison.class_names) + 1)
                row[i].set_xlabel("absent" if np.isnan(dice).all() else f"Dice {100 * np.nanmean(dice):.1f} %")
        title = volume.name if volume.planar else f"{volume.name}, slice {z}"
        row[0].set_ylabel(textwrap.fill(title, 30), fontsize=8)
    class_legend(figure, comparison.class_names)
    save_figure(figure, path)
    return (
        f"Image, label and the predictions of each method's first seed on {', '.join(cases)}. Of a volume, the slice "
        "is shown in which the methods' errors differ most. Dice is the mean over the classes in this slice."
    )


def _save(figure: Figure, path: Path) -> None:
    """Write a figure with the legend of its first axes below it."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes:
        if legend := axes.get_legend():
            legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
