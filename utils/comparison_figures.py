"""Pictures of several methods side by side: what they score, how they trained, what they predict."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.evaluation import Volume
from utils.figures import (
    class_legend,
    coloured,
    count_epochs,
    draw_series,
    grey_limits,
    pixel_aspect,
    save_figure,
    upright_steps,
)
from utils.metrics import Metrics, dice_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, those that stand out on white."""
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Example:
    """One slice as every method segments it, the right way up.

    image: (H, W), or uint8 (H, W, 3); limits: the values drawn black and white; aspect: a pixel's height in widths;
    label and predictions, by method: class indices (H, W).
    """

    title: str
    image: np.ndarray
    limits: tuple[float, float]
    aspect: float
    label: np.ndarray
    predictions: Mapping[str, np.ndarray]


def method_style(i: int) -> dict[str, object]:
    """Give the colour and line style of the method of index i, alike for 28 of them."""
    return {"color": METHOD_COLOURS[i % 7], "linestyle": _LINE_STYLES[i // 7 % 4]}


def save_box_plots(path: str | Path, class_names: Sequence[str], values: Mapping[str, np.ndarray], unit: str) -> None:
    """Draw the Dice and HD95 of every case as boxes, class by class, one box per method, and the cases as dots.

    values: by method (cases, classes, 4) as `Metrics`, Dice in [0, 1], HD95 in `unit`; NaN is left out. A box goes from
    the lower to the upper quartile with the median in it, its whiskers to the last case within 1.5 times its height.
    """
    from matplotlib.figure import Figure

    width = max(7.0, 1.6 + 0.22 * len(class_names) * (len(values) + 1))
    figure = Figure(figsize=(min(width, 20.0), 7.0), layout="constrained")
    dice, hd95 = figure.subplots(2, 1, sharex=True)
    _draw_boxes(dice, values, Metrics._fields.index("dice"), 100)
    dice.set_ylabel("Dice [%]")
    _draw_boxes(hd95, values, Metrics._fields.index("hd95"), 1)
    hd95.set_ylabel(f"HD95 [{unit}]")
    hd95.set_ylim(bottom=0)
    wrapped = [textwrap.fill(name, 14) for name in class_names]
    hd95.set_xticks(range(len(class_names)), wrapped, parse_math=False)
    _method_legend(figure, list(values))
    save_figure(figure, path)


def save_curves(path: str | Path, histories: Mapping[str, Sequence[Sequence[Mapping[str, object]]]]) -> None:
    """Draw training loss and validation Dice over the epochs, a line per run in the colour of its method.

    histories: by method the rows of `metrics.csv` of each seed. What is missing, empty or NaN is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for i, seeds in enumerate(histories.values()):
        style = method_style(i) | {"alpha": 1 if len(seeds) == 1 else 0.7}
        for history in seeds:
            draw_series(loss, "training loss", history, "train_loss", **_series_style(style))
            draw_series(dice, "validation Dice [%]", history, "val_dice", scale=100, **_series_style(style))
    for axes in (loss, dice):
        count_epochs(axes)
    if any(row.get("selected_on") == "test" for seeds in histories.values() for rows in seeds for row in rows):
        dice.set_ylabel("Dice of what the best epoch is chosen on [%]")
    _method_legend(figure, list(histories))
    save_figure(figure, path)


def example(volume: Volume, predictions: Mapping[str, np.ndarray]) -> Example:
    """Choose the slice of a labelled volume on which the methods' errors differ most, of equals that of most label.

    predictions: by method class indices (D, H, W). Everything far from label and predictions is cut away.
    """
    wrong = np.array([(p != volume.label).sum((1, 2)) for p in predictions.values()])  # (methods, D)
    labelled = (volume.label > 0).sum((1, 2))
    z = int(np.lexsort((-labelled, wrong.min(0) - wrong.max(0)))[0])
    steps = upright_steps(volume)
    shown = [volume.label[z], *(p[z] for p in predictions.values())]
    box = _around(np.any([mask > 0 for mask in shown], axis=0), share=0.35)
    title = volume.name if volume.planar else f"{volume.name}, slice {z}"
    return Example(
        title,
        volume.image[z][box][steps],
        grey_limits(volume),
        pixel_aspect(volume),
        volume.label[z][box][steps],
        {name: p[z][box][steps] for name, p in predictions.items()},
    )


def save_qualitative(path: str | Path, examples: Sequence[Example], class_names: Sequence[str]) -> None:
    """Draw one example per row: the image, its label, and what each method predicts, with its strict Dice there.

    The examples are of the same methods.
    """
    from matplotlib.figure import Figure

    columns = ["image", "label", *examples[0].predictions]
    side = 2.3
    heights = [min(1.6, e.aspect * e.image.shape[0] / e.image.shape[1]) * side for e in examples]
    figure = Figure(
        figsize=(side * len(columns) + 0.4, sum(heights) + 0.15 * len(examples) + 1.0), layout="constrained"
    )
    grid = figure.subplots(len(examples), len(columns), squeeze=False, height_ratios=heights)
    for row, shown in zip(grid, examples, strict=True):
        masks = [None, shown.label, *shown.predictions.values()]
        for axes, mask in zip(row, masks, strict=True):
            low, high = shown.limits
            axes.imshow(shown.image, "gray", vmin=low, vmax=high, aspect=shown.aspect)
            if mask is not None:
                axes.imshow(coloured(mask), aspect=shown.aspect, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(textwrap.fill(shown.title, 30), fontsize=8, parse_math=False)
        for axes, prediction in zip(row[2:], shown.predictions.values(), strict=True):
            dice = dice_only(prediction, shown.label, len(class_names) + 1)
            there = dice[~np.isnan(dice)]
            axes.set_xlabel(f"Dice {100 * there.mean():.1f} %" if len(there) else "absent", fontsize=8)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(textwrap.fill(name, 22), fontsize=9, parse_math=False)
    class_legend(figure, class_names)
    save_figure(figure, path)


def _draw_boxes(axes: "Axes", values: Mapping[str, np.ndarray], metric: int, scale: float) -> None:
    step = 0.8 / len(values)
    for i, per_case in enumerate(values.values()):
        columns = [scale * column[~np.isnan(column)] for column in per_case[:, :, metric].T]
        places = np.arange(len(columns)) + step * (i - (len(values) - 1) / 2)
        style = method_style(i)
        boxes = axes.boxplot(columns, positions=places, widths=0.8 * step, showfliers=False, manage_ticks=False)
        for parts in boxes.values():
            for part in parts:
                part.set(**style)
        for median in boxes["medians"]:
            median.set_linewidth(2.5)
        for place, column in zip(places, columns, strict=True):
            across = np.random.default_rng(0).uniform(-0.25, 0.25, len(column)) * step  # so that cases do not cover
            axes.plot(place + across, column, ".", color=style["color"], markersize=3, alpha=0.5)
    axes.grid(axis="y", alpha=0.3)


def _series_style(style: Mapping[str, object]) -> dict[str, object]:
    """Give a style by the argument names of `draw_series`."""
    return {("colour" if name == "color" else name): value for name, value in style.items()}


def _method_legend(figure: "Figure", names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=textwrap.fill(name, 60), **method_style(i)) for i, name in enumerate(names)]
    columns = max(1, min(4, math.floor(100 / max(8, *map(len, names), 0))))
    for text in figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False).get_texts():
        text.set_parse_math(False)


def _around(mask: np.ndarray, share: float) -> tuple[slice, slice]:
    """Give the box around a mask (H, W), wider by a share of its longer side, or to a third of H or W; of none all."""
    if not mask.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    longest = max(span[-1] - span[0] + 1 for span in spans)
    margin = max(int(share * longest), (min(mask.shape) // 3 - longest) // 2) + 1
    return tuple(slice(max(0, span[0] - margin), span[-1] + 1 + margin) for span in spans)
