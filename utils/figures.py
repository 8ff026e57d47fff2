"""Pictures of a run and of its predictions, as PNG files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.files import atomic_write, file_stem
from utils.evaluation import Volume
from utils.metrics import dice_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, the ones that stand out on grey first.
COLOURS = ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#FFFFFF")


def class_colour(c: int) -> str:
    """Give the colour of class index `c`, from 1, as `#RRGGBB`."""
    return COLOURS[(c - 1) % len(COLOURS)]


def class_rgb(c: int) -> tuple[int, int, int]:
    """Give the colour of class index `c`, from 1, as red, green and blue from 0 to 255."""
    colour = class_colour(c)
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def save_overlays(folder: str | Path, volume: Volume, prediction: np.ndarray, count: int = 3) -> list[Path]:
    """Draw image, label and prediction side by side for some slices, as radiologists look at them where it is known.

    prediction: class indices (D, H, W). Writes up to `count` files `<case>_slice<z>.png` into `folder` and gives
    their paths. With a label these are the slices with most wrong voxels, worst first, of equally wrong ones the one
    with the larger label; the legend gives each class's strict Dice in the slice. Without a label they are spread
    evenly over the slices in which something was found, and the legend gives the classes.
    """
    paths = []
    for z in _slices_to_draw(volume, prediction, count):
        stem, title = f"{file_stem(volume.name)}_slice{z:03d}", f"{volume.name}, slice {z}"
        if volume.planar:
            stem, title = file_stem(volume.name), volume.name
        paths.append(Path(folder) / f"{stem}.png")
        if volume.label is not None:
            title += f", {(prediction[z] != volume.label[z]).sum()} wrong {'pixels' if volume.planar else 'voxels'}"
        save_figure(_overlay(volume, prediction[z], z, title), paths[-1])
    return paths


def _slices_to_draw(volume: Volume, prediction: np.ndarray, count: int) -> np.ndarray:
    if volume.label is None:
        found = np.flatnonzero(prediction.any((1, 2)))
        found = found if len(found) else np.arange(len(prediction))
        return np.unique(found[np.linspace(0, len(found) - 1, count + 2).round().astype(int)[1:-1]])
    wrong = (prediction != volume.label).sum((1, 2))
    size = (volume.label > 0).sum((1, 2))
    return np.lexsort((-size, -wrong))[:count]


def save_picture_overlay(path: str | Path, image: np.ndarray, mask: np.ndarray) -> None:
    """Write an image with its classes painted over it, at its own size, as PNG or by the path's ending.

    image: uint8 (H, W, 3); mask: class indices (H, W).
    """
    from PIL import Image

    painted = image.copy()
    rim = _rim(mask)
    for c in np.unique(mask[mask > 0]):
        colour, inside = np.array(class_rgb(c)), mask == c
        painted[inside] = (0.65 * image[inside] + 0.35 * colour).astype(np.uint8)
        painted[inside & rim] = colour
    with atomic_write(path) as temporary:
        Image.fromarray(painted).save(temporary)


def save_progress(path: str | Path, history: Sequence[Mapping[str, object]]) -> None:
    """Draw the course of a training: losses with the learning rate, validation Dice, K and cluster use.

    `history` is the rows of `metrics.csv`, numbers or their text: `epoch`, every `*_loss`, `val_dice` in [0, 1],
    `k`, `lr`, `cluster_use` (share of clusters in use, in [0, 1]). What is missing, empty or NaN is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    loss, dice, k, use = figure.subplots(2, 2, sharex=True).flat
    _draw_losses(loss, history)
    _draw_dice(dice, history)
    draw_series(k, "K (columns replaced)", history, "k", COLOURS[3])
    draw_series(use, "clusters in use [%]", history, "cluster_use", COLOURS[5], scale=100)
    use.set_ylim(-4, 104)
    k.set_ylim(bottom=0)
    for axes in (k, use):
        count_epochs(axes)
    save_figure(figure, path)


def _overlay(volume: Volume, prediction: np.ndarray, z: int, title: str) -> "Figure":
    from matplotlib.figure import Figure

    names = _class_names(volume, prediction)
    image, steps = volume.image[z], upright_steps(volume)
    height, width = image.shape[:2]
    aspect = pixel_aspect(volume)
    masks = {"image": None, "label": None if volume.label is None else volume.label[z], "prediction": prediction}
    if volume.label is None:
        del masks["label"]
    panel_height = min(3.6 * aspect * height / width, 7.2)
    figure = Figure(figsize=(3.67 * len(masks), panel_height + 1.1), layout="constrained")
    low, high = grey_limits(volume)
    for axes, (name, mask) in zip(figure.subplots(1, len(masks)), masks.items(), strict=True):
        axes.imshow(image[steps], "gray", vmin=low, vmax=high, aspect=aspect)
        if mask is not None:
            axes.imshow(coloured(mask)[steps], aspect=aspect, interpolation="nearest")
        axes.set_title(name, fontsize=11)
        axes.axis("off")
    texts = names
    if volume.label is not None:
        dice = dice_only(prediction, volume.label[z], len(names) + 1)
        texts = [_legend_text(name, dice[c]) for c, name in enumerate(names)]
    figure.suptitle(title, fontsize=12).set_parse_math(False)
    class_legend(figure, texts)
    return figure


def class_legend(figure: "Figure", texts: Sequence[str]) -> None:
    """Put the colours of the classes below a figure, `texts` beside them."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=class_colour(c), edgecolor="black", linewidth=0.5, label=text)
        for c, text in enumerate(texts, 1)
    ]
    for text in figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False).get_texts():
        text.set_parse_math(False)  # a `$` in a name is no formula


def grey_limits(volume: Volume) -> tuple[float, float]:
    """Give the values that are drawn black and white, of an image 0 and 255."""
    if volume.planar:
        return 0, 255
    low, high = np.percentile(volume.image[:: max(1, len(volume.image) // 16)], (0.5, 99.5))
    return low, max(high, low + 1e-6)


def pixel_aspect(volume: Volume) -> float:
    """Give a pixel's height in widths."""
    return 1.0 if volume.spacing is None else volume.spacing[1] / volume.spacing[2]


def _class_names(volume: Volume, prediction: np.ndarray) -> list[str]:
    """Give the volume's class names, and numbers for the classes beyond them."""
    last = int(max(prediction.max(), 0 if volume.label is None else volume.label.max()))
    return [*volume.class_names, *(f"class {c}" for c in range(len(volume.class_names) + 1, last + 1))]


def _legend_text(name: str, dice: float) -> str:
    return f"{name}: absent" if math.isnan(dice) else f"{name}: Dice {100 * dice:.1f} %"


def coloured(mask: np.ndarray) -> np.ndarray:
    """Paint class indices (H, W) as RGBA (H, W, 4): faint inside, so that the image shows, firm at the rim."""
    from matplotlib.colors import to_rgba

    painted = np.zeros((*mask.shape, 4))
    rim = _rim(mask)
    for c in np.unique(mask[mask > 0]):
        painted[mask == c] = to_rgba(class_colour(c), 0.35)
        painted[(mask == c) & rim] = to_rgba(class_colour(c), 1.0)
    return painted


def _rim(mask: np.ndarray) -> np.ndarray:
    """Give the pixels (H, W) that have a direct neighbour of another class."""
    padded = np.pad(mask, 1, mode="edge")
    neighbours = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return np.any([n != mask for n in neighbours], axis=0)


def upright_steps(volume: Volume) -> tuple[slice, slice]:
    """Give the steps along rows and columns by which the front comes to the top and the patient's right to the left."""
    if volume.affine is None:
        return slice(None), slice(None)
    from nibabel import aff2axcodes

    x, y, _ = aff2axcodes(volume.affine)
    return slice(None, None, -1 if y == "A" else 1), slice(None, None, -1 if x == "R" else 1)


def _draw_losses(axes: "Axes", history: Sequence[Mapping[str, object]]) -> None:
    names = dict.fromkeys(name for row in history for name in row if name.endswith("_loss"))
    for name, colour in zip(names, (COLOURS[6], *COLOURS), strict=False):
        draw_series(axes, "loss", history, name, colour, label=name.removesuffix("_loss"))
    rate = axes.twinx()
    draw_series(rate, "learning rate (dotted)", history, "lr", "0.5", linestyle=":")
    rate.grid(False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    rate.tick_params(axis="y", colors="0.5")
    rate.yaxis.label.set_color("0.5")
    if len(names) > 1:
        axes.legend(frameon=False)


def _draw_dice(axes: "Axes", history: Sequence[Mapping[str, object]]) -> None:
    on_test = any(row.get("selected_on") == "test" for row in history)
    title = f"{'Dice on the test volumes' if on_test else 'validation Dice'} [%]"
    epochs, dice = draw_series(axes, title, history, "val_dice", COLOURS[2], scale=100)
    if not epochs:
        return
    best = int(np.argmax(dice))
    axes.plot(epochs[best], dice[best], "*", color="black", markersize=12)
    axes.set_title(f"best {dice[best]:.2f} % in epoch {epochs[best]:.0f}", fontsize=10)


def count_epochs(axes: "Axes") -> None:
    """Let the axis across count whole epochs, be it one."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, (low + high - 1) / 2), max(high, (low + high + 1) / 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_series(
    axes: "Axes", title: str, history: Sequence[Mapping[str, object]], key: str, colour: str, scale: float = 1, **style
) -> tuple[list[float], list[float]]:
    """Plot one column against the epochs where both have a number, and give these points."""
    points = [(_number(row.get("epoch")), scale * _number(row.get(key))) for row in history]
    points = [point for point in points if all(map(math.isfinite, point))]
    epochs, values = [p[0] for p in points], [p[1] for p in points]
    axes.plot(epochs, values, color=colour, marker="." if len(points) < 40 else None, **style)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    return epochs, values


def _number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
