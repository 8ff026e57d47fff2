"""Convert a data set into the files that training and testing read.

    python prepare_data.py synapse --raw DIR    # BTCV's folders img and label
    python prepare_data.py acdc --raw DIR       # the challenge's folders, or a folder of h5 volumes
    python prepare_data.py segpc --raw DIR      # the challenge's folders x and y; --crops for single cells
    python prepare_data.py isic --raw DIR       # the challenge's two folders of task 1
    python prepare_data.py phantom              # a small simulated data set with its own lists
    python prepare_data.py custom --raw DIR     # your own: Decathlon, nnU-Net, or images with labels

Scans become train_npz (slices) and test_vol_h5 (volumes) in the folder --out; colour images become images and masks.
The lists decide which of them train, validate and test. An interrupted preparation continues when it is run again.
"""

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

from datasets import DATASETS, acdc, custom, isic, phantom, segpc, synapse
from datasets.errors import counted
from datasets.lists import PATTERN_HELP
from utils.cli import ArgumentParser, number, run_script

logger = logging.getLogger("prepare_data")

# For each data set: the function that prepares it (the flags below are its arguments), its help, and help for --raw.
SETS = {
    "synapse": (synapse.prepare, "Synapse (BTCV), abdominal CT", "folder that holds img and label (RawData/Training)"),
    "acdc": (acdc.prepare, "ACDC, cardiac MR", "folder of patientXXX folders (NIfTI) or of h5 volumes"),
    "segpc": (segpc.prepare, "SegPC-2021, plasma cells", "folder with x and y, or with train and valid that hold them"),
    "isic": (isic.prepare, "ISIC-2018 task 1, skin lesions", "folder that holds the challenge's two folders"),
    "custom": (custom.prepare, "data of your own", "folder that holds dataset.json, or images and labels (or masks)"),
    "phantom": (phantom.write_phantom, "simulated volumes of hearts, to try everything without real data", None),
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    parser_of = {name: parsers.add_parser(name, help=about) for name, (_, about, _) in SETS.items()}
    for name, one in parser_of.items():
        if raw := SETS[name][2]:
            one.add_argument("--raw", required=True, help=raw)
            one.add_argument("--overwrite", action="store_true", help="prepare finished files again")
        folder = DATASETS[name].folder if name in DATASETS else "data/ followed by the folder name of --raw"
        one.add_argument("--out", help=f"folder to write to (default: {folder})")
        one.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="parallel processes")
    text = "order of the label ids in the raw files"
    parser_of["synapse"].add_argument("--label_order", default="btcv13", choices=synapse.LABEL_ORDERS, help=text)
    text = f"write single cells, by default to {segpc.CROPS_FOLDER}"
    parser_of["segpc"].add_argument("--crops", action="store_true", help=text)
    add, parts = parser_of["phantom"].add_argument, ("TRAIN", "VAL", "TEST")
    count, about = number(int, 1), "number of patients in each list"
    add("--num_patients", type=count, nargs=3, default=phantom.NUM_PATIENTS, metavar=parts, help=about)
    add("--seed", type=number(int, 0), default=2222, help="seed of the random hearts")
    add = parser_of["custom"].add_mutually_exclusive_group().add_argument
    add("--normalize", choices=("percentiles", "zscore"), help="scale each scan; default: percentiles, for CT a window")
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities that become 0 and 1 in all scans")
    add = parser_of["custom"].add_argument
    add("--axis", choices=custom.AXES, help="plane of the slices; default: across the axis of the largest spacing")
    add("--class_names", nargs="+", help="class names by ascending label value; default: as declared, or class 1, ...")
    add("--folds", type=number(int, 2), help="number of folds; default: 5, or the number of patients if smaller")
    add("--test", type=number(int, 0, 90), default=0, help="percentage of patients that are used only for the test")
    add("--splits", type=Path, help="nnU-Net's splits_final.json, or a folder of lists, to take the folds from")
    add("--seed", type=int, default=2222, help="seed of the random folds")
    add("--patient_pattern", help=PATTERN_HELP)
    add("--skip_bad", action="store_true", help="leave out cases that cannot be used")
    args = parser.parse_args()
    if args.out is None:
        own = f"data/{Path(args.raw).resolve().name}" if args.dataset == "custom" else DATASETS[args.dataset].folder
        args.out = segpc.CROPS_FOLDER if vars(args).get("crops") else own
    return args


def main() -> None:
    options = vars(parse_args())
    name, out = options.pop("dataset"), Path(options["out"])
    names = SETS[name][0](**options)

    info = custom.info_of(out) if name == "custom" else DATASETS[name]
    written = out / "lists" / ("fold_0" if name == "custom" else "")
    list_dir = written if written.is_dir() else Path(info.list_dir)  # or the lists of the repository
    made = replace(info, folder=str(out))
    where = info.flags(made.root_path, made.volume_path, list_dir)
    splits = [split for split in info.splits if (list_dir / f"{split}.txt").is_file()]
    only = "" if len(splits) == len(info.splits) else f" --splits {' '.join(splits)}"
    logger.info("prepared in %s: %s", out, counted(len(names), "image" if info.planar else "volume"))
    checked = info.train_script.replace("train_custom.py", "custom") if name == "custom" else name
    logger.info("next, check them:  python -m utils.verify %s", f"{checked} {where}{only}".rstrip())
    logger.info("then train:        python %s", f"{info.train_script} {where}".rstrip())


if __name__ == "__main__":
    run_script(main)
