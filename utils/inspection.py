"""Look inside a trained network: what its memory has learned, what DS-GIM picks out, what the gate lets through.

    python -m utils.inspection --checkpoint runs/acdc/best.pth
    python -m utils.inspection --checkpoint runs/acdc/best.pth --input scan.nii.gz --slice 5
    tensorboard --logdir runs/acdc/inspection

Writes into a folder beside the checkpoint, as PNG and for TensorBoard:
    memory_use.png     share of clusters in use over the epochs; what part of an epoch's keys came to each cluster
    k.png              K over the epochs, which W-LD sets
    prototypes.png     cosine similarity of the prototypes of each block
    clusters.png       with --input: the cluster of each token over the image, for each block
    windows.png        with --input: the two windows that DS-GIM selects, for each of its positions
    gate.png           with --input: what the gate lets the DMW-LA encoder see; over the epochs, how much of its images
A cluster has the same colour in clusters.png and in memory_use.png. The two need not agree: training sends a key to the
cluster of the largest dot product, a token reads that of the largest cosine.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from utils.cli import ArgumentParser, run_script
from utils.errors import RunError
from utils.events import EventFile
from utils.exported import is_export
from utils.figures import COLOURS, count_epochs, draw_series, save_figure, upright_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("inspect")

PICTURES = ("memory_use", "k", "prototypes", "clusters", "windows", "gate")
COURSE = ("k", "k_decoder", "cluster_use", "gate")  # of the rows of metrics.csv


class Bank(Protocol):
    """What this room asks of a block's memory; `networks.PrototypeMemoryBank` has it."""

    prototypes: torch.Tensor
    key_counts: torch.Tensor
    in_warmup: bool
    writable: bool


class Block(Protocol):
    """What this room asks of a block with a memory; `networks.DMWLA` has it."""

    bank: Bank


class Network(Protocol):
    """What this room asks of a network that is looked into; `networks.SimMPNet` has it."""

    config: dict[str, Any]

    def memory_blocks(self) -> Iterator[tuple[str, Block]]: ...

    def observe(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]: ...


def save_cluster_maps(
    path: str | Path, image: np.ndarray, clusters: Mapping[str, np.ndarray], num_clusters: Mapping[str, int]
) -> None:
    """Draw, block by block, which cluster each token of an image belongs to.

    image: (H, W) or (H, W, 3); clusters: indices (h, w) by name, each covering the whole image; num_clusters: how many
    a block has, by the same names.
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


def save_windows(path: str | Path, image: np.ndarray, windows: np.ndarray) -> None:
    """Draw, position by position, the windows that DS-GIM selects in a frame; the others are dimmed.

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


def save_gate(path: str | Path, image: np.ndarray, gate: np.ndarray, history: Sequence[Mapping[str, object]]) -> None:
    """Draw an image, what the gate lets through of it, and where that was recorded its mean share over the epochs.

    image: (H, W) or (H, W, 3), not negative; gate: (h, w) in [0, 1], covering the whole image; history: rows of
    ``metrics.csv``.
    """
    from matplotlib.figure import Figure

    recorded = any(row.get("gate") not in (None, "") for row in history)
    figure = Figure(figsize=(9 if recorded else 6, 3), layout="constrained")
    places = figure.subplots(1, 2 + recorded)
    share = F.interpolate(torch.from_numpy(gate)[None, None], image.shape[:2], mode="bilinear")[0, 0].numpy()
    let_through = image * share.reshape(share.shape + (1,) * (image.ndim - 2))
    _show(places[0], image, "image")
    _show(places[1], let_through.astype(image.dtype), f"gate {100 * gate.min():.0f} to {100 * gate.max():.0f} % open")
    places[1].images[0].set_clim(*places[0].images[0].get_clim())
    if recorded:
        draw_series(places[2], "gate open [%]", history, "gate", COLOURS[2], scale=100)
        places[2].set_ylim(-4, 104)
        count_epochs(places[2])
    save_figure(figure, path)


def save_prototype_similarity(path: str | Path, prototypes: Mapping[str, np.ndarray]) -> None:
    """Draw, block by block, the cosines of all pairs of prototypes.

    prototypes: (num_clusters, d) by name. A prototype of length 0 has cosine 0 with all.
    """
    figure, axes = _panels(len(prototypes))
    for place, (name, vectors) in zip(axes, prototypes.items(), strict=True):
        cosines = cosine_similarity(vectors)
        apart = cosines[~np.eye(len(cosines), dtype=bool)]
        mean = f", mean {apart.mean():.2f}" if apart.size else ""
        drawn = place.imshow(cosines, "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        place.set_title(f"{name}{mean}", fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="cosine")
    save_figure(figure, path)


def cosine_similarity(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines (n, n) of vectors (n, d), 0 for one of length 0."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def save_memory_use(
    path: str | Path, history: Sequence[Mapping[str, object]], key_counts: Mapping[str, np.ndarray]
) -> None:
    """Draw the share of clusters in use over the epochs, and how the keys of the last one spread over the clusters.

    history: rows of ``metrics.csv``; key_counts: keys of the checkpoint's epoch, (num_clusters,) by name of the block.
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


def save_k(path: str | Path, history: Sequence[Mapping[str, object]]) -> None:
    """Draw K, the columns per cluster that a step replaces, over the epochs: encoder and decoder."""
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
    model: Network,
    history: Sequence[Mapping[str, object]],
    folder: str | Path,
    image: np.ndarray | None = None,
    network_input: np.ndarray | None = None,
    steps: tuple[slice, slice] = (slice(None), slice(None)),
) -> list[Path]:
    """Write every picture that there is something for into a folder, and the same for TensorBoard beside them.

    Args:
        model: on the CPU; it is put into evaluation mode and its memory frozen.
        history: rows of ``metrics.csv``, or none.
        folder: where to.
        image: what to draw over, (H, W) or (H, W, 3).
        network_input: the same as the network takes it, float32 (1, C, S, S).
        steps: along rows and columns, by which the image is drawn upright (``figures.upright_steps``).

    Returns:
        The PNGs.

    Raises:
        RunError: there is nothing to draw.
    """
    folder = Path(folder)
    banks = {name: block.bank for name, block in model.memory_blocks()}
    pictures: dict[str, Callable[[Path], None]] = {}
    warming_up = any(bank.in_warmup for bank in banks.values())
    if warming_up:
        logger.warning("the memory is still in its warm-up: it has no clusters and no prototypes yet")
    elif banks:
        counts = {name: bank.key_counts.numpy() for name, bank in banks.items()}
        prototypes = {name: bank.prototypes.numpy() for name, bank in banks.items()}
        pictures["memory_use"] = lambda path: save_memory_use(path, history, counts)
        pictures["prototypes"] = lambda path: save_prototype_similarity(path, prototypes)
    if history and banks:
        pictures["k"] = lambda path: save_k(path, history)
    if image is not None:
        image = image[steps]
        for bank in banks.values():
            bank.writable = False
        model.eval()
        clusters, windows, gate = model.observe(torch.from_numpy(network_input))
        if banks and not warming_up:
            maps = {name: indices[0].numpy()[steps] for name, indices in clusters.items()}
            num_clusters = {name: len(bank.prototypes) for name, bank in banks.items()}
            pictures["clusters"] = lambda path: save_cluster_maps(path, image, maps, num_clusters)
        if windows is not None:
            grids = windows[0].numpy().reshape(-1, 2, 2)[(slice(None), *steps)]
            pictures["windows"] = lambda path: save_windows(path, image, grids)
        if gate is not None:
            shares = np.ascontiguousarray(gate[0, 0].numpy()[steps])  # torch takes no reversed axes
            pictures["gate"] = lambda path: save_gate(path, image, shares, history)

    if not pictures:
        others = "windows and gate need --input" if image is None else "there are neither windows nor a gate"
        raise RunError(f"nothing to draw: no memory is in use, and {others}")
    paths = [folder / f"{name}.png" for name in PICTURES if name in pictures]
    for path in paths:
        pictures[path.stem](path)
    _write_events(folder, paths, history)
    return paths


def _write_events(folder: Path, paths: Sequence[Path], history: Sequence[Mapping[str, Any]]) -> None:
    """Write pictures, and the course of K and of cluster use, for TensorBoard, in place of what was there."""
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
    """Return a hue for each cluster, which the brightness of the image below does not hide."""
    return [hsv_to_rgb(cluster / count, 0.8, 0.95) for cluster in range(count)]


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    parser.add_argument(
        "--input", type=Path, help="scan (NIfTI, DICOM folder), photograph, or prepared .npy.h5 or .npz"
    )
    parser.add_argument("--slice", type=int, help="z of the slice of a scan, from 0; default: the middle")
    parser.add_argument("--output", type=Path, help="folder; default: inspection, beside the checkpoint")
    parser.add_argument("--dataset", help="what a checkpoint of the release was trained on")
    args = parser.parse_args()
    if is_export(args.checkpoint):
        raise RunError(
            f"--checkpoint {args.checkpoint} is an export, which has no blocks to look into: give a best.pth"
        )
    args.output = args.output or args.checkpoint.parent / "inspection"
    return args


def main(open_predictor: Callable, read_prepared: Callable) -> None:
    """Look into the checkpoint that the command line names.

    open_predictor: `predict.Predictor`; read_prepared: gives the volume of a prepared file.
    """
    args = parse_args()
    predictor = open_predictor(args.checkpoint, "cpu", dataset=args.dataset)
    model, seen = predictor.model, {}
    if not hasattr(model, "observe"):
        name = model.config["network"]
        raise RunError(f"--checkpoint {args.checkpoint}: {name} has no memory to look into; give one of sim_mpnet")
    if args.input is not None:
        prepared = args.input.name.endswith((".h5", ".npz"))
        volume = read_prepared(args.input) if prepared else predictor.read(args.input)
        z = len(volume.image) // 2 if args.slice is None else args.slice
        if not 0 <= z < len(volume.image):
            raise RunError(f"--slice {z}: {args.input} has {len(volume.image)}, numbered from 0")
        network_input = volume.network_input(model.config["img_size"], slice(z, z + 1))
        seen = dict(image=volume.image[z], network_input=network_input, steps=upright_steps(volume))
    paths = inspect(model, predictor.history, args.output, **seen)
    logger.info("%s and, for TensorBoard, events in %s", ", ".join(path.name for path in paths), args.output)


if __name__ == "__main__":
    # The one place of this room that knows networks and data, as the scripts do.
    from datasets import DataError, Volume, read_slice, read_volume
    from networks import NetworkError
    from utils.predictor import Predictor

    def read_prepared(path: Path) -> Volume:
        """Return a prepared volume, or a prepared slice as a volume of one."""
        if path.name.endswith(".h5"):
            return read_volume(path)
        image, label = read_slice(path)
        return Volume(path.stem, image[None], label[None])

    run_script(lambda: main(Predictor, read_prepared), DataError, NetworkError)
