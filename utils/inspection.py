"""Look inside a trained network: what its memory has learned, what DS-GIM selects, what the gate lets through.

    python -m utils.inspection --checkpoint runs/acdc/best.pth
    python -m utils.inspection --checkpoint runs/acdc/best.pth --input scan.nii.gz --slice 5
    tensorboard --logdir runs/acdc/inspection

Writes into a folder beside the checkpoint, as PNG and for TensorBoard:
    memory_use.png     share of clusters in use over the epochs; share of an epoch's keys in each cluster
    k.png              K over the epochs, which W-LD sets
    prototypes.png     cosine similarity of the prototypes of each block
    clusters.png       with --input: the cluster of each token over the image, for each block
    windows.png        with --input: the two windows that DS-GIM selects, for each of its positions
    gate.png           with --input: what the gate lets the DMW-LA encoder see; over the epochs, its mean
A cluster has the same colour in clusters.png and in memory_use.png. The two pictures may disagree: training assigns a
key to the cluster with the largest dot product, a token reads the cluster with the largest cosine.
"""

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from datasets import DataError, Picture, Volume, read_slice, read_volume
from networks import NetworkError, SimMPNet
from utils.cli import ArgumentParser, run_script
from utils.errors import RunError
from utils.figures import COLOURS, count_epochs, draw_series, save_figure, upright_steps
from utils.onnx_network import is_onnx
from utils.predictor import Predictor
from utils.run_folder import EventFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("inspect")

COURSE = ("k", "k_decoder", "cluster_use", "gate")
"""Columns of metrics.csv that TensorBoard shows."""

History = Sequence[Mapping[str, Any]]
"""Rows of metrics.csv."""


def save_cluster_maps(
    path: Path, image: np.ndarray, clusters: Mapping[str, np.ndarray], num_clusters: Mapping[str, int]
) -> None:
    """Draw, for each block, the cluster of each token over the image.

    image: (H, W) or (H, W, 3); clusters: indices (h, w) by name of the block, each over the whole image; num_clusters:
    of the block, by the same names.
    """
    figure, axes = _panels(len(clusters) + 1)
    _show(axes[0], image, "image")
    height, width = image.shape[:2]
    for place, (name, indices) in zip(axes[1:], clusters.items(), strict=True):
        count = num_clusters[name]
        _show(place, image, f"{name}: {len(np.unique(indices))} of {count}")
        painted = np.array(_colours(count))[indices]  # (h, w, 3)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        place.imshow(painted, alpha=0.5, interpolation="nearest", extent=extent)
    save_figure(figure, path)


def save_windows(path: Path, image: np.ndarray, windows: np.ndarray) -> None:
    """Draw, for each position, the windows that DS-GIM selects in a frame, the others dimmed.

    image: (H, W) or (H, W, 3); windows: bool (positions, 2, 2).
    """
    from matplotlib.patches import Rectangle

    figure, axes = _panels(len(windows), columns=3)
    height, width = image.shape[0] / 2, image.shape[1] / 2  # of a window
    for position, (place, selected) in enumerate(zip(axes, windows, strict=True)):
        _show(place, image, f"DS-GIM {position + 1}")
        for (row, column), frame in np.ndenumerate(selected):
            style = dict(fill=False, edgecolor=COLOURS[0], linewidth=2) if frame else dict(color="black", alpha=0.6)
            corner = (column * width - 0.5, row * height - 0.5)
            place.add_patch(Rectangle(corner, width, height, zorder=2 + frame, **style))
    save_figure(figure, path)


def save_gate(path: Path, image: np.ndarray, gate: np.ndarray, history: History) -> None:
    """Draw an image, what the gate lets through of it, and the gate's mean over the epochs if it was recorded.

    image: (H, W) or (H, W, 3), not negative; gate: (H, W) in [0, 1].
    """
    from matplotlib.figure import Figure

    recorded = any(row.get("gate") not in (None, "") for row in history)
    figure = Figure(figsize=(9 if recorded else 6, 3), layout="constrained")
    places = figure.subplots(1, 2 + recorded)
    let_through = image * gate.reshape(gate.shape + (1,) * (image.ndim - 2))
    _show(places[0], image, "image")
    _show(places[1], let_through.astype(image.dtype), f"gate {100 * gate.min():.0f} to {100 * gate.max():.0f} % open")
    places[1].images[0].set_clim(*places[0].images[0].get_clim())
    if recorded:
        draw_series(places[2], "gate open [%]", history, "gate", COLOURS[2], scale=100)
        places[2].set_ylim(-4, 104)
        count_epochs(places[2])
    save_figure(figure, path)


def save_prototype_similarity(path: Path, prototypes: Mapping[str, np.ndarray]) -> None:
    """Draw, for each block, the cosines of all pairs of prototypes.

    prototypes: (num_clusters, d) by name of the block. A prototype of length 0 has cosine 0 with all.
    """
    figure, axes = _panels(len(prototypes))
    for place, (name, vectors) in zip(axes, prototypes.items(), strict=True):
        cosines = cosine_similarity(vectors)
        others = cosines[~np.eye(len(cosines), dtype=bool)]
        mean = f", mean {others.mean():.2f}" if others.size else ""
        drawn = place.imshow(cosines, "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        place.set_title(f"{name}{mean}", fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="cosine")
    save_figure(figure, path)


def cosine_similarity(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines (n, n) of vectors (n, d), 0 for a vector of length 0."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def save_memory_use(path: Path, history: History, key_counts: Mapping[str, np.ndarray]) -> None:
    """Draw the share of clusters in use over the epochs, and the share of keys in each cluster.

    key_counts: keys in the checkpoint's epoch, (num_clusters,) by name of the block.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    use, shares = figure.subplots(2, 1)
    draw_series(use, "clusters in use [%]", history, "cluster_use", COLOURS[5], scale=100)
    use.set_ylim(-4, 104)
    count_epochs(use)
    for name, counts in key_counts.items():
        share = 100 * counts / max(counts.sum(), 1)
        below = share.cumsum() - share
        shares.bar([name] * len(share), share, bottom=below, color=_colours(len(share)), edgecolor="white")
    shares.set_ylabel("keys of the last epoch,\nby cluster [%]")
    shares.tick_params(axis="x", rotation=90)
    save_figure(figure, path)


def save_k(path: Path, history: History) -> None:
    """Draw K, the columns per cluster that a step replaces, over the epochs, of encoder and decoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_series(axes, "K (columns replaced)", history, "k", COLOURS[3], label="encoder", linewidth=4)
    draw_series(axes, "K (columns replaced)", history, "k_decoder", COLOURS[6], label="decoder", linestyle="--")
    axes.set_ylim(bottom=0)
    count_epochs(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)


def inspect(
    model: SimMPNet, history: History, folder: Path, volume: Volume | Picture | None = None, z: int = 0
) -> list[Path]:
    """Write every picture that there is something for, and the same for TensorBoard; return the PNGs.

    Args:
        model: on the CPU; is put into evaluation mode, its memory frozen.
        history: rows of ``metrics.csv``, or none.
        folder: where to write.
        volume: what to look at; without it, clusters, windows and gate are not drawn.
        z: the slice of it.

    Raises:
        RunError: there is nothing to draw.
    """
    blocks = dict(model.memory_blocks())
    banks = {name: block.bank for name, block in blocks.items()}
    in_use = bool(banks) and not any(bank.in_warmup for bank in banks.values())
    paths: list[Path] = []

    def path(name: str) -> Path:
        paths.append(Path(folder) / f"{name}.png")
        return paths[-1]

    if banks and not in_use:
        logger.warning("the memory is in its warm-up: it has no clusters and no prototypes yet")
    if in_use:
        save_memory_use(path("memory_use"), history, {name: bank.key_counts.numpy() for name, bank in banks.items()})
    if history and banks:
        save_k(path("k"), history)
    if in_use:
        save_prototype_similarity(path("prototypes"), {name: bank.prototypes.numpy() for name, bank in banks.items()})
    if volume is not None:
        for bank in banks.values():
            bank.writable = False
        seen = model.eval().observe(torch.from_numpy(volume.network_input(model.config["img_size"], slice(z, z + 1))))
        rows, columns = upright_steps(volume)
        image = volume.image[z][rows, columns]
        if in_use:
            maps = {name: indices[0].numpy()[rows, columns] for name, indices in seen.clusters.items()}
            save_cluster_maps(
                path("clusters"), image, maps, {name: len(bank.prototypes) for name, bank in banks.items()}
            )
        if seen.windows is not None:
            save_windows(path("windows"), image, seen.windows[0].numpy().reshape(-1, 2, 2)[:, rows, columns])
        if seen.gate is not None:
            gate = F.interpolate(seen.gate, image.shape[:2], mode="bilinear")[0, 0].numpy()
            save_gate(path("gate"), image, gate[rows, columns], history)
    if not paths:
        others = "windows and gate need --input" if volume is None else "there are neither windows nor a gate"
        raise RunError(f"nothing to draw: no memory is in use, and {others}")
    _write_events(Path(folder), paths, history)
    return paths


def _write_events(folder: Path, paths: Sequence[Path], history: History) -> None:
    """Write pictures and the course of K, cluster use and gate for TensorBoard, in place of older ones."""
    from PIL import Image

    events = EventFile(folder / "events")
    for path in paths:
        with Image.open(path) as picture:
            events.add_picture(path.stem, np.asarray(picture.convert("RGB")))
    for row in history:
        events.add({f"memory/{name}": row[name] for name in COURSE if name in row}, row["epoch"])
    events.flush()


def _panels(count: int, columns: int = 6) -> tuple["Figure", list["Axes"]]:
    """Return a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.3 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, list(axes[:count])


def _show(axes: "Axes", image: np.ndarray, title: str) -> None:
    axes.imshow(image, "gray")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _colours(count: int) -> list[tuple[float, float, float]]:
    """Return a bright colour for each cluster."""
    return [hsv_to_rgb(cluster / count, 0.8, 0.95) for cluster in range(count)]


def read_input(path: Path, predictor: Predictor) -> Volume | Picture:
    """Read a prepared volume, a prepared slice (as a volume of one), or a scan or image as ``predict.py`` does."""
    if path.name.endswith(".h5"):
        return read_volume(path)
    if path.name.endswith(".npz"):
        image, label = read_slice(path)
        return Volume(path.stem, image[None], label[None])
    return predictor.read(path)


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    parser.add_argument("--input", type=Path, help="scan (NIfTI, DICOM folder), photograph, prepared .npy.h5 or .npz")
    parser.add_argument("--slice", type=int, help="z of the slice of a scan, from 0; default: the middle")
    parser.add_argument("--output", type=Path, help="folder; default: inspection, beside the checkpoint")
    parser.add_argument("--dataset", help="what a checkpoint of the release was trained on")
    args = parser.parse_args()
    if is_onnx(args.checkpoint):
        raise RunError(f"--checkpoint {args.checkpoint} is an ONNX file, which cannot be inspected: give a best.pth")
    args.output = args.output or args.checkpoint.parent / "inspection"
    return args


def main() -> None:
    args = parse_args()
    predictor = Predictor(args.checkpoint, "cpu", dataset=args.dataset)
    model = predictor.model
    if not isinstance(model, SimMPNet):
        name = model.config["network"]
        raise RunError(f"--checkpoint {args.checkpoint}: {name} has no memory to inspect: give one of sim_mpnet")
    volume, z = None, 0
    if args.input is not None:
        volume = read_input(args.input, predictor)
        depth = len(volume.image)
        z = depth // 2 if args.slice is None else args.slice
        if not 0 <= z < depth:
            raise RunError(f"--slice {z}: {args.input} has {depth} slices, numbered from 0")
    paths = inspect(model, predictor.history, args.output, volume, z)
    logger.info("%s and, for TensorBoard, events in %s", ", ".join(path.name for path in paths), args.output)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
