"""Bring a data set into the form that training and testing read.

    python prepare_data.py synapse --raw DIR    # BTCV's folders img and label
    python prepare_data.py acdc --raw DIR       # the challenge's folders, or a folder of h5 volumes
    python prepare_data.py segpc --raw DIR      # the challenge's folders x and y; --crops for single cells
    python prepare_data.py isic --raw DIR       # the challenge's two folders of task 1
    python prepare_data.py phantom              # a small data set made here, with its own lists

Scans become train_npz (slices) and test_vol_h5 (volumes) under --out, colour images images and masks. Which of them are
for training, validation or test is for the lists to say. A preparation that was cut short goes on where it stopped.
"""

import argparse
import logging
import os
from pathlib import Path

from datasets import DATASETS, DataError, acdc, isic, phantom, segpc, synapse
from utils.cli import ArgumentParser, run_script

logger = logging.getLogger("prepare_data")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    ct = kinds.add_parser("synapse", help="Synapse (BTCV), abdominal CT")
    ct.add_argument("--raw", required=True, help="folder that holds img and label, RawData/Training of BTCV")
    ct.add_argument(
        "--label_order", default="btcv13", choices=synapse.LABEL_ORDERS, help="what the raw labels' ids mean"
    )

    mr = kinds.add_parser("acdc", help="ACDC, cardiac MR")
    mr.add_argument("--raw", required=True, help="folder of patientXXX folders (NIfTI) or of h5 volumes")

    cells = kinds.add_parser("segpc", help="SegPC-2021, plasma cells")
    cells.add_argument("--raw", required=True, help="folder that holds x and y, or train and valid with them")
    cells.add_argument("--crops", action="store_true", help="single cells in place of images, to data/SegPC_crops")

    lesions = kinds.add_parser("isic", help="ISIC-2018 task 1, skin lesions")
    lesions.add_argument("--raw", required=True, help="folder that holds the challenge's folders of images and masks")

    made = kinds.add_parser("phantom", help="volumes of made-up hearts, to try everything out")
    made.add_argument(
        "--num_patients", type=int, nargs=3, default=phantom.NUM_PATIENTS, metavar=("TRAIN", "VAL", "TEST")
    )
    made.add_argument("--seed", type=int, default=2222, help="seed of the hearts")

    for name, kind in kinds.choices.items():
        crops = f"; {segpc.CROPS_FOLDER} with --crops" if name == "segpc" else ""
        kind.add_argument("--out", help=f"folder to write to (default: {DATASETS[name].folder}{crops})")
        kind.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    for kind in (ct, mr, cells, lesions):
        kind.add_argument("--overwrite", action="store_true", help="prepare again what is ready already")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    info = DATASETS[args.dataset]
    cells = args.dataset == "segpc" and args.crops
    args.out = args.out or (segpc.CROPS_FOLDER if cells else info.folder)
    list_dir = info.list_dir
    if args.dataset == "synapse":
        names = synapse.prepare(args.raw, args.out, args.jobs, args.overwrite, args.label_order)
    elif args.dataset == "acdc":
        names = acdc.prepare(args.raw, args.out, args.jobs, args.overwrite)
    elif args.dataset == "segpc":
        names = segpc.prepare(args.raw, args.out, args.jobs, args.overwrite, args.crops)
        list_dir = f"{args.out}/lists"
    elif args.dataset == "isic":
        names = isic.prepare(args.raw, args.out, args.jobs, args.overwrite)
        list_dir = f"{args.out}/lists"
    else:
        names = phantom.write_phantom(args.out, args.num_patients, args.seed, args.jobs)
        list_dir = f"{args.out}/lists"
    splits = ""
    if info.planar:
        where = f"--root_path {args.out} --list_dir {list_dir}"
        written = [split for split in info.splits if Path(list_dir, f"{split}.txt").is_file()]
        splits = "" if len(written) == len(info.splits) else f" --splits {' '.join(written)}"
    else:
        where = f"--root_path {args.out}/train_npz --volume_path {args.out}/test_vol_h5 --list_dir {list_dir}"
    logger.info("%d %s are ready in %s", len(names), "images" if info.planar else "volumes", args.out)
    logger.info("next, check them:  python -m utils.verify %s %s%s", args.dataset, where, splits)
    logger.info("then train:        python %s %s", info.train_script, where)


if __name__ == "__main__":
    run_script(main, DataError)
