"""Bring a data set into the form that training and testing read.

    python prepare_data.py acdc --raw DIR    # the challenge's folders, or a folder of h5 volumes
    python prepare_data.py phantom           # a small data set made here, with its own lists

Both write train_npz (slices) and test_vol_h5 (volumes) under --out. Whether a patient is for training, validation or
test is for the lists to say. A preparation that was cut short goes on where it stopped.
"""

import argparse
import logging
import os

from datasets import DataError, acdc, phantom
from utils.cli import ArgumentParser, run_script, setup_logging

logger = logging.getLogger("prepare_data")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    real = kinds.add_parser("acdc", help="ACDC, cardiac MR")
    real.add_argument("--raw", required=True, help="folder of patientXXX folders (NIfTI) or of h5 volumes")
    real.add_argument("--out", default="data/ACDC", help="folder to write to")
    real.add_argument("--overwrite", action="store_true", help="prepare again what is ready already")

    made = kinds.add_parser("phantom", help="volumes of made-up hearts, to try everything out")
    made.add_argument("--out", default="data/phantom", help="folder to write to")
    made.add_argument(
        "--num_patients", type=int, nargs=3, default=phantom.NUM_PATIENTS, metavar=("TRAIN", "VAL", "TEST")
    )
    made.add_argument("--seed", type=int, default=2222, help="seed of the hearts")

    for kind in (real, made):
        kind.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    setup_logging()
    if args.dataset == "acdc":
        names = acdc.prepare(args.raw, args.out, args.jobs, args.overwrite)
        list_dir = "lists/lists_ACDC"
    else:
        names = phantom.write_phantom(args.out, args.num_patients, args.seed, args.jobs)
        list_dir = f"{args.out}/lists"
    where = f"--root_path {args.out}/train_npz --volume_path {args.out}/test_vol_h5 --list_dir {list_dir}"
    logger.info("%d volumes are ready in %s", len(names), args.out)
    logger.info("next, check them:  python -m datasets.verify %s %s", args.dataset, where)
    logger.info("then train:        python train_acdc.py %s", where)


if __name__ == "__main__":
    run_script(main, DataError)
