"""Figures of a run and of its predictions, as PNG files."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import generate_binary_structure, morphological_gradient

from datasets import Volume
from datasets.files import atomic_write, file_stem
from datasets.image_files import save_png
from utils.metrics import dice_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#F0E442", "#CC79A7", "#0072B2", "#FFFFFF")
"""Okabe and Ito's colours, which colour-blind people can distinguish; the first ones also stand out on white."""


def class_colour(c: int) -> str:
    """Return the colour of class index ``c`` (from 1) as ``#RRGGBB``; the first 255 colours are all different."""
    if c <= len(COLOURS):
        return COLOURS[c - 1]
    # Hues are spaced by the golden ratio, so that neighbouring indices differ.
    rgb = hsv_to_rgb(c * 0.618034 % 1, 0.5 + 0.4 * (c % 2), 0.65 + 0.3 * (c // 2 % 2))
    return "#" + bytes(round(255 * x) for x in rgb).hex().upper()


def class_rgb(c: int) -> tuple[int, int, int]:
    """Return the colour of class index ``c`` (from 1) as red, green and blue from 0 to 255."""
    return tuple(bytes.fromhex(class_colour(c)[1:]))


def save_overlays(folder: str | Path, volume: Volume, prediction: np.ndarray, count: int = 3) -> list[Path]:
    """Draw image, label and prediction side by side for up to ``count`` slices; return the paths.

    The files are ``<case>_slice<z>.png``, for an image ``<case>.png``. Slice files of an earlier call are deleted. With
    a label, the slices with the most wrong voxels are drawn, the worst first; of equally wrong ones, those with more
    labelled voxels come first. Without a label, the slices are spread evenly over those with a predicted class, or
    over all slices if there are none. prediction: class indices (D, H, W).
    """
    if volume.label is None:
        found = np.flatnonzero(prediction.any((1, 2)))
        found = found if len(found) else np.arange(len(prediction))
        slices = np.unique(found[np.linspace(0, len(found) - 1, count + 2).round().astype(int)[1:-1]])
    else:
        wrong = (prediction != volume.label).sum((1, 2))
        slices = np.lexsort((-(volume.label > 0).sum((1, 2)), -wrong))[:count]
    stem = file_stem(volume.name)
    for old in Path(folder).glob(f"{stem}_slice*.png"):
        if re.fullmatch(r"_slice[0-9]+\.png", old.name.removeprefix(stem)):
            old.unlink()
    paths = [Path(folder) / (f"{stem}.png" if volume.planar else f"{stem}_slice{z:03d}.png") for z in slices]
    for path, z in zip(paths, slices, strict=True):
        draw_masks(path, volume, z, prediction[z])
    return paths


def draw_masks(path: str | Path, volume: Volume, z: int, prediction: np.ndarray) -> None:
    """Draw slice ``z`` of a volume, its label if it has one, and a prediction (H, W), side by side.

    With a label, the strict Dice of each class in the slice and the number of wrong voxels are written below the
    prediction. The first channel of a scan is shown, with grey values from their 0.5th to their 99.5th percentile. If
    the affine is known, an axial slice has the patient's front at the top and the patient's right at the left.
    """
    from matplotlib.figure import Figure

    label = None if volume.label is None else volume.label[z]
    masks = {"image": None} | ({} if label is None else {"label": label}) | {"prediction": prediction}
    steps, every = upright_steps(volume), max(1, len(volume.image) // 16)
    shown = [volume.plane(i) for i in range(0, len(volume.image), every)]
    low, high = (0, 255) if volume.planar else np.percentile(shown, (0.5, 99.5))
    image = volume.plane(z)
    height, width = image.shape[:2]
    aspect = 1.0 if volume.spacing is None else volume.spacing[1] / volume.spacing[2]  # pixel height / pixel width
    figure = Figure(figsize=(3.67 * len(masks), min(3.6 * aspect * height / width, 7.2) + 1.4), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(1, len(masks)), masks.items(), strict=True):
        axes.imshow(image[steps], "gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
        if mask is not None:
            axes.imshow(coloured(mask[steps]), aspect=aspect, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(name, fontsize=11)
        if name == "prediction" and label is not None:
            dice = dice_only(mask, label, len(volume.class_names) + 1)
            text = ", ".join("absent" if np.isnan(share) else f"{100 * share:.1f}" for share in dice)
            wrong = f"{(mask != label).sum()} wrong {'pixels' if volume.planar else 'voxels'}"
            axes.set_xlabel(f"{textwrap.fill(f'Dice [%] {text}', 46)}\n{wrong}", fontsize=9)
    title = volume.name if volume.planar else f"{volume.name}, slice {z}"
    figure.suptitle(title, fontsize=12).set_parse_math(False)  # a `$` in a name must not start a formula
    add_legend(figure, volume.class_names)
    save_figure(figure, path)


def add_legend(figure: "Figure", class_names: Sequence[str]) -> None:
    """Write the classes and their colours below the panels of a figure."""
    from matplotlib.patches import Patch

    style = dict(edgecolor="black", linewidth=0.5)
    handles = [Patch(facecolor=class_colour(c), label=name, **style) for c, name in enumerate(class_names, 1)]
    for text in figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False).get_texts():
        text.set_parse_math(False)


def make_panels(count: int, columns: int) -> tuple["Figure", list["Axes"]]:
    """Return a figure with at most ``columns`` columns, and its ``count`` axes, row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.3 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def upright_steps(volume: Volume) -> tuple[slice, slice]:
    """Return slices of rows and columns that put, in axial slices, the front at the top and the right at the left."""
    if volume.affine is None:
        return slice(None), slice(None)
    from nibabel import aff2axcodes

    x, y, _ = aff2axcodes(volume.affine)
    return slice(None, None, -1 if y == "A" else 1), slice(None, None, -1 if x == "R" else 1)


def coloured(mask: np.ndarray) -> np.ndarray:
    """Return class indices (H, W) as RGBA, uint8 (H, W, 4): partly transparent inside a class, opaque at its border."""
    colours = [(0, 0, 0, 0), *((*class_rgb(c), 89) for c in range(1, int(mask.max()) + 1))]
    painted = np.array(colours, np.uint8)[mask]
    border = morphological_gradient(mask, footprint=generate_binary_structure(2, 1)) > 0
    painted[border & (mask > 0), 3] = 255
    return painted


def save_picture_overlay(path: str | Path, image: np.ndarray, mask: np.ndarray) -> None:
    """Write an image, uint8 (H, W, 3), with its class indices (H, W) painted over it, at its own size."""
    from PIL import Image

    picture, classes = Image.fromarray(image), Image.fromarray(coloured(mask))
    picture.paste(classes, mask=classes)
    save_png(path, np.asarray(picture))


def save_progress(path: str | Path, history: Sequence[Mapping[str, Any]], select_from: int = 1) -> None:
    """Draw the curves of a training over its epochs, with one panel for each kind of number.

    history: rows of metrics.csv, numbers or text; a value that is missing, empty or not finite is not drawn. Each kind
    of gate has its own colour, and each level its own line style. select_from: the first epoch that can be the best.
    """
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = pd.DataFrame(list(history)).apply(pd.to_numeric, errors="coerce").replace([-np.inf, np.inf], np.nan)
    selected_on = "test" if any(row.get("selected_on") == "test" for row in history) else "val"
    panels = [  # title, columns, factor
        ("loss", [name for name in numbers if name.endswith("_loss")], 1),
        (f"{dice_name(selected_on)} [%]", ["val_dice"], 100),
        ("gates let through [%]", [name for name in numbers if name.startswith("gate")], 100),
        ("learning rate", ["lr"], 1),
        ("K (columns replaced)", ["k"], 1),
        ("clusters in use [%]", ["cluster_use"], 100),
    ]
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    for axes, (title, columns, factor) in zip(figure.subplots(2, 3).ravel(), panels, strict=True):
        kinds = list(dict.fromkeys(name.rstrip("_1234") for name in columns))
        for name in columns:
            points = numbers.reindex(columns=["epoch", name]).dropna()
            epochs, values = points["epoch"], points[name] * factor
            line = ("-", "--", "-.", ":")[int(name[-1]) - 1 if name[-1].isdigit() else 0]
            style = {"color": COLOURS[kinds.index(name.rstrip("_1234"))], "marker": "." if len(points) < 40 else None}
            axes.plot(epochs, values, line, label=name, **style)
            if name == "val_dice" and len(of_these := values[epochs >= select_from]):
                best = of_these.idxmax()
                axes.plot(epochs[best], values[best], "*", color="black", markersize=12)
                title = f"{title}, best {values[best]:.2f} in epoch {epochs[best]:.0f}"
        if len(columns) > 1:
            beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(columns) > 4 else {}
            axes.legend(fontsize="x-small", handlelength=3, **beside)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def dice_name(selected_on: str | None) -> str:
    """Return the name of the Dice that chooses the best epoch; ``selected_on`` is ``val``, ``test`` or None."""
    return "Dice on the test volumes" if selected_on == "test" else "validation Dice"


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
