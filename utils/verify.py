"""Check a prepared data set before a network is trained on it, and print what it holds.

    python -m utils.verify acdc
    python -m utils.verify acdc --splits train val              # without the test volumes
    python -m utils.verify synapse --label_order transunet      # files that others prepared
    python -m utils.verify segpc                                # images and masks
    python -m utils.verify phantom --root_path data/phantom/train_npz --volume_path data/phantom/test_vol_h5 \\
        --list_dir data/phantom/lists

Every file of every split is read: slices in the first split and volumes in the others, or images and masks. The exit
status is 1 if there is an error. A warning names something that is probably wrong.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from datasets import DATASETS, DataError, DatasetInfo, custom
from datasets.errors import counted
from datasets.lists import PATTERN_HELP
from utils.cli import ArgumentParser, number, run_script
from utils.data_checks import NAMELESS, Split, check, most_classes_absent, open_cases, open_samples, patients_of_list


def full_check(args: Namespace, info: DatasetInfo) -> tuple[list[Split], list[str]]:
    """Read every file of every split. Returns (what was found in each readable split, errors, one line each).

    args: arguments of this command: the folders, the splits, the number of classes and the patient pattern.
    """
    info.label_order(vars(args).get("label_order"), args.num_classes)  # raises for an order that does not fit
    parts, errors = [], []
    for split in args.splits:
        try:
            if split == args.splits[0] and not info.planar:
                data = open_samples(info, args, split, img_size=1)
            else:
                data = open_cases(info, args, split)
            parts.append(Split(data, info, args.patient_pattern))
        except DataError as error:
            errors.append(str(error))
    own, others = {*args.splits} <= {*info.splits}, []  # other lists may share cases with these
    for split in (split for split in info.splits if own and split not in args.splits):
        try:
            others += patients_of_list(args, info, split)
        except DataError as error:
            errors.append(str(error))
    return parts, errors + check(parts, others=others)[1] + most_classes_absent(parts)


def data_parser(prog: str, description: str) -> ArgumentParser:
    """Return a parser with the flags that choose the data."""
    parser = ArgumentParser(prog=prog, description=description)
    orders = [order for info in DATASETS.values() for order in info.label_orders]
    parser.add_argument("dataset", choices=[*DATASETS, "custom"])
    parser.add_argument("--data", help="for custom: folder that prepare_data.py custom wrote")
    parser.add_argument("--root_path", help="folder of the slices, or of images and masks")
    parser.add_argument("--list_dir", help="folder of the lists")
    parser.add_argument("--num_classes", type=number(int, 2), help="number of classes, background included")
    parser.add_argument("--label_order", choices=orders, help="order of label ids in Synapse's files; default: paper")
    return parser


def fill_in(args: Namespace) -> DatasetInfo:
    """Return the facts of the data set that the flags name, and set flags that were left out to its values."""
    if (args.data is None) == (args.dataset == "custom"):
        raise DataError("--data FOLDER and the data set custom need each other: give both or neither")
    info = DATASETS[args.dataset] if args.data is None else custom.info_of(args.data)
    for name in ("root_path", "volume_path", "list_dir", "splits", "num_classes", "patient_pattern"):
        if name in args and getattr(args, name) is None:
            setattr(args, name, getattr(info, name))
    return info


def main(argv: Sequence[str] | None = None) -> int:
    """Run the full check from the command line; return the exit status."""
    parser = data_parser("python -m utils.verify", __doc__)
    parser.add_argument("--volume_path", help="folder of the volumes")
    parser.add_argument("--splits", nargs="+", help="names of the lists; the first is the one to train on")
    parser.add_argument("--patient_pattern", help=PATTERN_HELP)
    args = parser.parse_args(argv)
    info = fill_in(args)
    parts, errors = full_check(args, info)
    for part in parts:
        part.print()
    if parts and all(part.nameless for part in parts):
        print(f"warning: {NAMELESS % info.name}")
    if not all(part.grouped for part in parts):
        print("every volume counts as one patient; if a patient has several, group them with --patient_pattern")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        print(f"{counted(len(errors), 'error')} found", file=sys.stderr)
        return 1
    defaults = {"num_classes": info.num_classes, "label_order": None, "patient_pattern": info.patient_pattern}
    given = {name: str(getattr(args, name)) for name, value in defaults.items() if getattr(args, name) != value}
    more = [f"--{name} {shlex.quote(value)}" for name, value in given.items()]
    folders = info.flags(args.root_path, args.volume_path, args.list_dir)
    print("no errors found; next: python", *filter(None, [info.train_script, folders, *more]))
    return 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
