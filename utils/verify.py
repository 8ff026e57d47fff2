"""Check a prepared data set before a network is trained on it.

    python -m utils.verify acdc
    python -m utils.verify acdc --splits train val              # without the test volumes
    python -m utils.verify synapse --label_order transunet      # files that others prepared
    python -m utils.verify segpc                                # images and masks
    python -m utils.verify phantom --root_path data/phantom/train_npz --volume_path data/phantom/test_vol_h5 \\
        --list_dir data/phantom/lists

Every file of every split is read: of the first split the slices, of the others the volumes; or images and masks. The
exit status is 1 if an error was found. A warning tells of something that is probably wrong.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets import DATASETS, DataError, DatasetInfo, ImageDataset, ImageFolder, SliceDataset, Volume, VolumeDataset
from datasets.image_sets import image_of
from datasets.images import Picture
from datasets.lists import patient_of, read_list
from datasets.storage import LabelOrder
from utils.cli import ArgumentParser, number, run_script

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """What was found in one split."""

    source: Path  # its list
    kind: str  # slices, volumes or images
    count: int  # of these
    patients: set[str]  # of a planar set: its images, which may have several crops
    voxels: np.ndarray  # of each class, (num_classes,)
    class_names: tuple[str, ...]  # those that the files name, or else those of the data set
    doubts: Counter[str] = field(default_factory=Counter)  # what is probably wrong, and in how many volumes


def quick_check(
    train_set: SliceDataset | ImageDataset, val_set: VolumeDataset | ImageFolder, info: DatasetInfo, test_list: Path
) -> None:
    """Check in seconds what training relies on: no patient in two splits, first and last case of each readable.

    test_list: the list of the test split, which need not exist. Its patients must be in neither set, unless ``val_set``
    is this split. Logs what looks wrong in the first volume. Raises DataError for the first error.
    """
    splits = [(train_set.source, train_set.patients), (val_set.source, val_set.patients)]
    if test_list != val_set.source and test_list.is_file():
        owner = image_of if info.planar else patient_of
        splits.append((test_list, {owner(name) for name in read_list(test_list.parent, test_list.stem)}))
    for error in _shared_patients(splits):
        raise DataError(error)
    for index in (0, -1):
        _ = train_set[index]
        volume = _read_volume(val_set, index)
        if index == 0:
            for doubt in info.doubts(volume.label, val_set.num_classes):
                logger.warning("%s: %s", val_set.files[volume.name][0], doubt)


def full_check(
    root_path: str | Path, volume_path: str | Path, list_dir: str | Path, splits: Sequence[str], num_classes: int,
    info: DatasetInfo, label_order: LabelOrder | None = None,
) -> tuple[list[Part], list[str]]:  # fmt: skip
    """Read every file of every split. Returns (what was found in each readable split, errors, one line each)."""
    parts, errors = [], []
    for index, split in enumerate(splits):
        try:
            if info.planar:
                kind, data = "images", ImageFolder(root_path, list_dir, split, num_classes, info.names_for(num_classes))
            elif index:
                kind, data = "volumes", VolumeDataset(volume_path, list_dir, split, num_classes, label_order)
            else:
                kind, data = "slices", SliceDataset(root_path, list_dir, split, num_classes, 1, label_order=label_order)
        except DataError as error:
            errors.append(str(error))
            continue
        voxels = np.zeros(num_classes, np.int64)
        part = Part(data.source, kind, len(data), data.patients, voxels, info.names_for(num_classes))
        parts.append(part)
        for i in tqdm(range(len(data)), desc=f"{split}, {kind}", disable=None, leave=False):
            try:
                if kind == "slices":
                    label = data.read(i)[1]
                else:
                    volume = _read_volume(data, i)
                    label, part.class_names = volume.label, volume.class_names or part.class_names
                    if num_classes == info.num_classes:
                        part.doubts.update(info.doubtful_places(label))
            except DataError as error:
                errors.append(str(error))
            else:
                voxels += np.bincount(label.ravel(), minlength=num_classes)
        if num_classes == info.num_classes:
            part.doubts.update(info.doubtful_sizes(voxels))
    return parts, errors + _shared_patients((part.source, part.patients) for part in parts)


def _read_volume(volumes: VolumeDataset | ImageFolder, index: int) -> Volume | Picture:
    """Read a volume; raise DataError where it names another number of classes than the data set has."""
    volume = volumes[index]
    if volume.class_names and len(volume.class_names) != volumes.num_classes - 1:
        raise DataError(
            f"{volumes.files[volume.name][0]}: names {len(volume.class_names)} classes "
            f"({', '.join(volume.class_names)}), but --num_classes is {volumes.num_classes} with background; "
            f"set --num_classes {len(volume.class_names) + 1}"
        )
    return volume


def _shared_patients(splits: Iterable[tuple[Path, set[str]]]) -> list[str]:
    """Return one line for every patient in two splits, each given as (list, patients)."""
    errors, first = [], {}
    for source, patients in splits:
        for patient in sorted(patients):
            other = first.setdefault(patient, source)
            if other is not source:
                errors.append(f"{source}: {patient} is also in {other.name}; remove it from one of them")
    return errors


def _print_part(part: Part) -> None:
    owners, unit = ("images", "pixels") if part.kind == "images" else ("patients", "voxels")
    print(f"{part.source.stem}: {part.count} {part.kind} of {len(part.patients)} {owners}")
    shares = part.voxels / max(part.voxels.sum(), 1)
    for name, share in zip(("background", *part.class_names), shares, strict=True):
        print(f"  {name:<20} {share:8.3%} of {unit}" + ("" if share else f"   warning: no {unit} of this class"))
    for doubt, count in part.doubts.items():
        print(f"  warning: {doubt}" + (f" ({count} {part.kind})" if count > 1 else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the full check from the command line; returns the exit status."""
    parser = ArgumentParser(prog="python -m utils.verify", description=__doc__)
    orders = [order for info in DATASETS.values() for order in info.label_orders]
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--root_path", help="folder of the slices, or of images and masks")
    parser.add_argument("--volume_path", help="folder of the volumes")
    parser.add_argument("--list_dir", help="folder of the lists")
    parser.add_argument("--num_classes", type=number(int, 2), help="number of classes, background included")
    parser.add_argument("--splits", nargs="+", help="names of the lists; the first is the one to train on")
    parser.add_argument(
        "--label_order", choices=orders, help="order of the label ids in Synapse's files; default: paper"
    )
    args = parser.parse_args(argv)
    info = DATASETS[args.dataset]
    num_classes = args.num_classes or info.num_classes
    folders = args.root_path or info.root_path, args.volume_path or info.volume_path, args.list_dir or info.list_dir
    order = info.label_order(args.label_order, num_classes)
    parts, errors = full_check(*folders, args.splits or info.splits, num_classes, info, order)
    for part in parts:
        _print_part(part)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        print(f"{len(errors)} error{'s' if len(errors) > 1 else ''} found", file=sys.stderr)
        return 1
    labels = f"--label_order {args.label_order}" if args.label_order else f"--num_classes {num_classes}"
    print(f"no errors found; next: python {info.train_script} {info.flags(*folders)} {labels}")
    return 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()), DataError)
