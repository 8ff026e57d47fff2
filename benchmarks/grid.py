"""Measure how much Dice a coarse output grid costs: ``python -m benchmarks.grid``.

    python -m benchmarks.grid runs/unet/best.pth --grids 24 32 40

The last head of Sim-MPNet works on a grid whose side is a quarter of ``img_size_dmwla``, that of U-Net on every pixel.
This command takes the labels and the predictions of each checkpoint as masks of ``--img_size`` squared. It averages
them to a grid, interpolates them back, and scores the arg max at the volume's resolution. The score of the labels is
not a strict upper bound, because logits can be sharper than averages.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from datasets import Volume, VolumeDataset, acdc
from datasets.transforms import resize_nearest
from utils.cli import ArgumentParser, run_script
from utils.evaluation import mean_dice
from utils.metrics import dice_only
from utils.predictor import Predictor
from utils.results import markdown

CLASSES = acdc.INFO.num_classes


def on_grid(volume: Volume, mask: np.ndarray, size: int, grid: int) -> np.ndarray:
    """Average each slice of a mask (D, H, W) to grid x grid, interpolate it back, and return the classes (D, H, W)."""
    small = torch.from_numpy(resize_nearest(mask, (size, size))).long()
    shares = F.one_hot(small, CLASSES).movedim(-1, 1).float()  # (D, CLASSES, size, size)
    shares = F.interpolate(F.adaptive_avg_pool2d(shares, grid), (size, size), mode="bilinear")
    return volume.restore(shares.argmax(1).byte().numpy())


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*", help="best.pth or last.pth of trainings on ACDC")
    parser.add_argument("--volume_path", default=acdc.INFO.volume_path, help="folder of the volumes")
    parser.add_argument("--list_dir", default=acdc.INFO.list_dir, help="folder of the lists")
    parser.add_argument("--split", default="val", help="list of the cases")
    parser.add_argument("--img_size", type=int, default=128, help="side of the masks in pixels")
    parser.add_argument("--grids", type=int, nargs="+", default=[24, 32, 40], help="sides of the grids")
    args = parser.parse_args()
    cases = list(VolumeDataset(args.volume_path, args.list_dir, args.split, CLASSES))
    masks = {"the labels": [volume.label for volume in cases]}
    masks |= {str(path): list(map(Predictor(path, info=acdc.INFO).segment, cases)) for path in args.checkpoints}
    rows = []
    for name, of_cases in masks.items():
        row: dict[str, object] = {"masks": name}
        for grid in (args.img_size, *args.grids):
            reduced = [on_grid(volume, mask, args.img_size, grid) for volume, mask in zip(cases, of_cases, strict=True)]
            scores = [dice_only(mask, case.label, CLASSES) for mask, case in zip(reduced, cases, strict=True)]
            row[f"grid {grid}"] = 100 * mean_dice(scores)[0]
        rows.append(row)
    print(f"mean Dice [%] of {len(cases)} volumes of {args.split}, with masks averaged to each grid:")
    print(markdown(pd.DataFrame(rows), ".2f"))


if __name__ == "__main__":
    run_script(main)
