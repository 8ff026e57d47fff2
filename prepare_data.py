"""Convert a data set into the files that training and testing read.

    python prepare_data.py synapse --raw DIR    # BTCV's folders img and label
    python prepare_data.py acdc --raw DIR       # the challenge's folders, or a folder of h5 volumes
    python prepare_data.py segpc --raw DIR      # the challenge's folders x and y; --crops for single cells
    python prepare_data.py isic --raw DIR       # the challenge's two folders of task 1
    python prepare_data.py phantom              # a small simulated data set with its own lists

Scans become train_npz (slices) and test_vol_h5 (volumes) in the folder --out; colour images become images and masks.
The lists decide which of them train, validate and test. An interrupted preparation continues when it is run again.
"""

import argparse
import logging
import os
from pathlib import Path

from datasets import DATASETS, DataError, acdc, isic, phantom, segpc, synapse
from datasets.info import SLICE_FOLDER, VOLUME_FOLDER
from utils.cli import ArgumentParser, run_script

logger = logging.getLogger("prepare_data")

# Of each data set: the function that prepares it (its arguments are the flags below), its help, and that of --raw.
SETS = {
    "synapse": (synapse.prepare, "Synapse (BTCV), abdominal CT", "folder that holds img and label (RawData/Training)"),
    "acdc": (acdc.prepare, "ACDC, cardiac MR", "folder of patientXXX folders (NIfTI) or of h5 volumes"),
    "segpc": (segpc.prepare, "SegPC-2021, plasma cells", "folder that holds x and y, or train and valid with them"),
    "isic": (isic.prepare, "ISIC-2018 task 1, skin lesions", "folder that holds the challenge's two folders"),
    "phantom": (phantom.write_phantom, "simulated volumes of hearts, to try everything without real data", None),
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, (_, about, raw) in SETS.items():
        one = parsers.add_parser(name, help=about)
        if raw:
            one.add_argument("--raw", required=True, help=raw)
            one.add_argument("--overwrite", action="store_true", help="prepare finished files again")
        one.add_argument("--out", help=f"folder to write to (default: {DATASETS[name].folder})")
        one.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="parallel processes")
    parsers.choices["synapse"].add_argument(
        "--label_order", default="btcv13", choices=synapse.LABEL_ORDERS, help="order of the label ids in the raw files"
    )
    parsers.choices["segpc"].add_argument(
        "--crops", action="store_true", help=f"write single cells, by default to {segpc.CROPS_FOLDER}"
    )
    parsers.choices["phantom"].add_argument(
        "--num_patients", type=int, nargs=3, default=phantom.NUM_PATIENTS, metavar=("TRAIN", "VAL", "TEST"),
        help="patients for training, validation and test",
    )  # fmt: skip
    parsers.choices["phantom"].add_argument("--seed", type=int, default=2222, help="seed of the random hearts")
    args = parser.parse_args()
    if args.out is None:
        args.out = segpc.CROPS_FOLDER if vars(args).get("crops") else DATASETS[args.dataset].folder
    return args


def main() -> None:
    options = vars(parse_args())
    info = DATASETS[options.pop("dataset")]
    names = SETS[info.name][0](**options)

    out = Path(options["out"])
    written = out / "lists"  # by this preparation; without these the lists in git are used
    list_dir = written if written.is_dir() else Path(info.list_dir)
    root, volumes = (out, out) if info.planar else (out / SLICE_FOLDER, out / VOLUME_FOLDER)
    where = info.flags(root, volumes, list_dir)
    splits = [split for split in info.splits if (list_dir / f"{split}.txt").is_file()]
    only = "" if len(splits) == len(info.splits) else f" --splits {' '.join(splits)}"
    logger.info("%d %s are ready in %s", len(names), "images" if info.planar else "volumes", out)
    logger.info("next, check them:  python -m utils.verify %s %s%s", info.name, where, only)
    logger.info("then train:        python %s %s", info.train_script, where)


if __name__ == "__main__":
    run_script(main, DataError)
