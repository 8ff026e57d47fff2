"""Look inside a trained network: what its memory has learned, what DS-GIM selects, and what the gates let through.

    python -m utils.inspection --checkpoint runs/acdc/best.pth
    python -m utils.inspection --checkpoint runs/acdc/best.pth --input scan.nii.gz --slice 5

Writes to the folder inspection next to the checkpoint; with --input, to a subfolder named after input and slice:
    memory_use.png     share of the last epoch's keys in each cluster, for each block
    prototypes.png     cosine similarity of the prototypes of each block
    clusters.png       with --input: the cluster of each token over the image, for each block
    windows.png        with --input: the two windows that DS-GIM selects (orange), for each of its positions
    gates.png          with --input: maps of the decoder's spatial gates and of the gate between the encoders, and the
                       mean of every gate
A cluster has the same colour in clusters.png and in memory_use.png. The two figures may disagree: training assigns a
key to the cluster with the largest dot product, but a token reads the cluster with the largest cosine.
"""

import logging
from collections.abc import Mapping
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets import DATASETS, Volume
from datasets.errors import counted
from datasets.files import file_stem
from networks import SimMPNet
from utils.cli import ArgumentParser, run_script
from utils.errors import RunError
from utils.figures import COLOURS, make_panels, save_figure, upright_steps
from utils.onnx_network import is_onnx
from utils.predictor import Predictor

logger = logging.getLogger("inspect")


def inspect(model: SimMPNet, volume: Volume | None = None, z: int = 0) -> dict[str, Figure]:
    """Draw every figure for which there are data; return the figures by name.

    model: on the CPU. volume: the network is run on slice ``z`` of it, in evaluation mode with its memory frozen;
    without a volume, clusters, windows and gates are not drawn. Raises RunError if there is nothing to draw.
    """
    banks = {name: block.bank for name, block in model.memory_blocks()}
    in_use = bool(banks) and not any(bank.in_warmup for bank in banks.values())
    figures = {}
    if in_use:
        figures["memory_use"] = draw_memory_use({name: bank.key_counts.numpy() for name, bank in banks.items()})
        figures["prototypes"] = draw_prototypes({name: bank.prototypes for name, bank in banks.items()})
    elif banks:
        logger.warning("the memory is in its warm-up: it has no clusters and no prototypes yet")
    if volume is not None:
        for bank in banks.values():
            bank.writable = False
        seen = model.eval().observe(torch.from_numpy(volume.network_input(model.config["img_size"], slice(z, z + 1))))
        steps = upright_steps(volume)
        image = volume.plane(z)[steps]
        if in_use:
            maps = {name: indices[0].numpy()[steps] for name, indices in seen.clusters.items()}
            figures["clusters"] = draw_clusters(image, maps, {name: len(banks[name].prototypes) for name in maps})
        if seen.windows is not None:
            figures["windows"] = draw_windows(image, seen.windows[0].numpy().reshape(-1, 2, 2)[:, steps[0], steps[1]])
        figures["gates"] = draw_gates_of_image(image, {name: m[0, 0].numpy()[steps] for name, m in seen.gates.items()})
        if volume.spacing:
            over_the_image = [figures[name] for name in ("clusters", "windows", "gates") if name in figures]
            for axes in (axes for figure in over_the_image for axes in figure.axes if axes.images):
                axes.set_aspect(volume.spacing[1] / volume.spacing[2])  # pixel height / pixel width
    if not figures:
        raise RunError("nothing to draw: no memory is in use, and windows and gates need --input")
    return figures


def draw_memory_use(key_counts: Mapping[str, np.ndarray]) -> Figure:
    """Draw the share of keys in each cluster. key_counts: keys of the last epoch, (num_clusters,) by block name."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for name, counts in key_counts.items():
        share = 100 * counts / max(counts.sum(), 1)
        below = share.cumsum() - share
        axes.bar([name] * len(share), share, bottom=below, color=_colours(len(share)), edgecolor="white")
    axes.set_ylabel("keys of the last epoch,\nby cluster [%]")
    axes.tick_params(axis="x", rotation=90)
    return figure


def draw_prototypes(prototypes: Mapping[str, torch.Tensor]) -> Figure:
    """Draw, for each block, the cosines of all pairs of its prototypes (num_clusters, d)."""
    figure, panels = make_panels(len(prototypes), 6)
    for axes, (name, vectors) in zip(panels, prototypes.items(), strict=True):
        unit = F.normalize(vectors, dim=1).numpy()
        cosines = unit @ unit.T
        others = (cosines.sum() - cosines.trace()) / max(cosines.size - len(cosines), 1)
        _show(axes, cosines, f"{name}, mean {others:.2f}", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(panels[-1].images[0], ax=panels, shrink=0.6, label="cosine")
    return figure


def draw_clusters(image: np.ndarray, clusters: Mapping[str, np.ndarray], num_clusters: Mapping[str, int]) -> Figure:
    """Draw, for each block, the cluster of each token over the image.

    image: (H, W) or (H, W, 3); clusters: indices (h, w) by block name; num_clusters: their number by block name.
    """
    figure, panels = make_panels(len(clusters) + 1, 6)
    _show(panels[0], image, "image")
    for axes, (name, indices) in zip(panels[1:], clusters.items(), strict=True):
        _show(axes, image, f"{name}: {len(np.unique(indices))} of {num_clusters[name]}")
        _paint(axes, image, np.array([(*colour, 0.5) for colour in _colours(num_clusters[name])])[indices])
    return figure


def draw_windows(image: np.ndarray, windows: np.ndarray) -> Figure:
    """Draw, for each position of DS-GIM, the image with the selected windows orange and the others dark.

    image: (H, W) or (H, W, 3); windows: bool (positions, 2, 2).
    """
    figure, panels = make_panels(len(windows), 3)
    for position, (axes, selected) in enumerate(zip(panels, windows, strict=True), 1):
        _show(axes, image, f"DS-GIM {position}")
        _paint(axes, image, np.where(selected[..., None], (0.9, 0.62, 0, 0.3), (0, 0, 0, 0.6)))
    return figure


def draw_gates_of_image(image: np.ndarray, gates: Mapping[str, np.ndarray]) -> Figure:
    """Draw an image, the gates that are maps over it, and the mean of every gate.

    image: (H, W) or (H, W, 3); gates: (h, w) in [0, 1] by name, (1, 1) if only the mean over the image is known.
    """
    maps = {name: gate for name, gate in gates.items() if gate.size > 1 or name == "gate"}
    figure, (whole, *panels, means) = make_panels(len(maps) + 2, 6)
    _show(whole, image, "image")
    for axes, (name, gate) in zip(panels, maps.items(), strict=True):
        percent = 100 * gate
        title = f"{name}: {percent.min():.0f} to {percent.max():.0f} %"
        _show(axes, percent, title, cmap="viridis", vmin=0, vmax=100, extent=_extent(image))
    means.barh(list(gates), [100 * gate.mean() for gate in gates.values()], color=COLOURS[2])
    means.set_xlim(0, 100)
    means.set_title("mean let through [%]", fontsize=9)
    means.tick_params(labelsize=6)
    means.invert_yaxis()
    return figure


def _show(axes: Axes, image: np.ndarray, title: str, cmap: str = "gray", **options: object) -> None:
    axes.imshow(image, cmap, **options)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _paint(axes: Axes, image: np.ndarray, colours: np.ndarray) -> None:
    """Paint RGBA colours (h, w, 4) over the whole image, (H, W) or (H, W, 3), that ``axes`` show."""
    axes.imshow(colours, interpolation="nearest", extent=_extent(image))


def _extent(image: np.ndarray) -> tuple[float, float, float, float]:
    """Return the ``extent`` that imshow gives to an image (H, W) or (H, W, 3)."""
    return -0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5


def _colours(count: int) -> list[tuple[float, float, float]]:
    """Return a bright colour for each cluster."""
    return [hsv_to_rgb(cluster / count, 0.8, 0.95) for cluster in range(count)]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or a release checkpoint")
    parser.add_argument("--input", type=Path, help="scan (NIfTI, DICOM folder), picture, .npy.h5 or .npz")
    parser.add_argument("--slice", type=int, help="index z of the slice of a scan, from 0; default: the middle slice")
    parser.add_argument("--output", type=Path, help="folder of the figures; default: inspection beside the checkpoint")
    parser.add_argument("--dataset", choices=DATASETS, help="data set that a checkpoint of the release was trained on")
    args = parser.parse_args()
    if is_onnx(args.checkpoint):
        raise RunError(f"--checkpoint {args.checkpoint} is an ONNX file, which cannot be inspected: give a best.pth")
    predictor = Predictor(args.checkpoint, "cpu", info=DATASETS.get(args.dataset))
    if not isinstance(predictor.model, SimMPNet):
        name = predictor.model.config["network"]
        raise RunError(f"--checkpoint {args.checkpoint}: {name} has no memory to inspect: give one of sim_mpnet")
    volume, z, folder = None, 0, args.output or args.checkpoint.parent / "inspection"
    if args.input is not None:
        volume = predictor.read(args.input)
        depth = len(volume.image)
        z = depth // 2 if args.slice is None else args.slice
        if not 0 <= z < depth:
            raise RunError(f"--slice {z}: {args.input} has {counted(depth, 'slice')}, numbered from 0: choose one")
        folder /= file_stem(volume.name) + f"_slice{z}" * (depth > 1)
    for name, figure in inspect(predictor.model, volume, z).items():
        save_figure(figure, folder / f"{name}.png")
    logger.info("figures are in %s", folder)


if __name__ == "__main__":
    run_script(main)
