"""Check a prepared data set before a network is trained on it.

    python -m utils.verify acdc
    python -m utils.verify acdc --splits train val              # where the test volumes are not at hand
    python -m utils.verify synapse --label_order transunet      # files that others made
    python -m utils.verify segpc                                # images and masks
    python -m utils.verify phantom --root_path data/phantom/train_npz --volume_path data/phantom/test_vol_h5 \\
        --list_dir data/phantom/lists

The first split is read as the slices to train on, the others as volumes; a set of images is read as images. Exits with
status 1 where anything is wrong; a warning is something that can hardly be right.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets import DATASETS
from datasets.errors import DataError
from datasets.image_sets import ImageDataset, ImageFolder, image_of
from datasets.images import Picture
from datasets.info import DatasetInfo
from datasets.lists import list_path, patient_of, read_list, select_files
from datasets.storage import LabelOrder
from datasets.volumes import SliceDataset, Volume, VolumeDataset, read_slice
from utils.cli import ArgumentParser, run_script

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """What a split holds: its files or volumes, whose they are, the voxels of each class, and what is doubtful."""

    split: str
    kind: str
    count: int = 0
    patients: set[str] = field(default_factory=set)
    voxels: np.ndarray | int = 0
    class_names: tuple[str, ...] = ()
    doubts: Counter = field(default_factory=Counter)


def quick_check(
    train_set: SliceDataset | ImageDataset,
    val_set: VolumeDataset | ImageFolder,
    info: DatasetInfo,
    test_list: Path,
) -> None:
    """Do what training does first, in seconds: no patient in two parts, the first and the last case of each readable.

    info: the data set, whose doubts about the first volume are logged as warnings; test_list: list of the test
    patients, who must be in neither part unless it is the one to validate on; one that is not there is passed over. Of
    a planar set the images stand for patients. Raises DataError for the first thing that is wrong.
    """
    parts = [(train_set.source, train_set.patients), (val_set.source, val_set.patients)]
    if test_list != val_set.source and test_list.is_file():
        parts.append((test_list, _owners(info, read_list(test_list.parent, test_list.stem))))
    for problem in _shared_patients(parts):
        raise DataError(problem)
    for index in (0, -1):
        _ = train_set[index]
        volume = _check_class_names(val_set, index)
        if index == 0:
            for doubt in info.doubts(volume.label, val_set.num_classes):
                logger.warning("%s: %s", val_set.files[volume.name][0], doubt)


def full_check(
    root_path: str | Path,
    volume_path: str | Path,
    list_dir: str | Path,
    splits: Sequence[str],
    num_classes: int,
    info: DatasetInfo,
    label_order: LabelOrder | None = None,
) -> tuple[list[Part], list[str]]:
    """Read every file of every split, the first as slices and the others as volumes.

    Returns (what each split holds, what is wrong, one line each).
    """
    problems, parts, patients = [], [], []
    for index, split in enumerate(splits):
        part = Part(split, "volumes" if index else "slices", voxels=np.zeros(num_classes, np.int64))
        try:
            if info.planar:
                part.kind = "images"
                images = ImageFolder(root_path, list_dir, split, num_classes, info.names_for(num_classes))
                labels, names = _volume_labels(images, part, problems, info), images.names
            elif index:
                volumes = VolumeDataset(volume_path, list_dir, split, num_classes, label_order)
                labels, names = _volume_labels(volumes, part, problems, info), volumes.names
            else:
                files = select_files(list_dir, split, root_path, endings=(".npz",))
                labels, names = _slice_labels(files, num_classes, label_order, problems), [file.name for file in files]
        except DataError as error:
            problems.append(str(error))
            continue
        for label in tqdm(labels, total=len(names), desc=f"{split}, {part.kind}", disable=None, leave=False):
            part.voxels += np.bincount(label.ravel(), minlength=num_classes)
        part.count = len(names)
        part.patients = _owners(info, names)
        if num_classes == info.num_classes:
            part.doubts.update(info.doubtful_sizes(part.voxels))
        parts.append(part)
    for split in splits:
        try:
            patients.append((list_path(list_dir, split), _owners(info, read_list(list_dir, split))))
        except DataError:
            continue  # said above
    return parts, problems + _shared_patients(patients)


def _owners(info: DatasetInfo, names: Iterable[str]) -> set[str]:
    """Return the patients that files or entries are of; of a planar set the images that they are, or are cut from."""
    return {image_of(name) if info.planar else patient_of(name) for name in names}


def _slice_labels(
    files: Sequence[Path], num_classes: int, label_order: LabelOrder | None, problems: list[str]
) -> Iterator[np.ndarray]:
    for file in files:
        try:
            yield read_slice(file, num_classes, label_order)[1]
        except DataError as error:
            problems.append(str(error))


def _volume_labels(volumes: VolumeDataset, part: Part, problems: list[str], info: DatasetInfo) -> Iterator[np.ndarray]:
    for index in range(len(volumes)):
        try:
            volume = _check_class_names(volumes, index)
        except DataError as error:
            problems.append(str(error))
            continue
        part.class_names = part.class_names or volume.class_names
        if volumes.num_classes == info.num_classes:
            part.doubts.update(info.doubtful_places(volume.label))
        yield volume.label


def _check_class_names(volumes: VolumeDataset | ImageFolder, index: int) -> Volume | Picture:
    """Return a volume whose class names, if it has any, are as many as its classes, or raise DataError."""
    volume = volumes[index]
    if volume.class_names and len(volume.class_names) != volumes.num_classes - 1:
        raise DataError(
            f"{volumes.files[volume.name][0]}: names {len(volume.class_names)} classes "
            f"({', '.join(volume.class_names)}), but num_classes is {volumes.num_classes} with background; "
            f"set --num_classes {len(volume.class_names) + 1}"
        )
    return volume


def _shared_patients(parts: Iterable[tuple[Path, set[str]]]) -> list[str]:
    """Return one line for every patient who is in two parts; a part is its list and its patients."""
    problems, home = [], {}
    for source, patients in parts:
        for patient in sorted(patients):
            other = home.setdefault(patient, source)
            if other is not source:
                problems.append(f"{source}: {patient} is also in {other.name}; take it out of one of them")
    return problems


def format_part(part: Part, class_names: Sequence[str]) -> str:
    """Return what a split holds as text: counts, the voxel share of each class by name, and what is doubtful."""
    of_whom, of_what = ("images", "pixels") if part.kind == "images" else ("patients", "voxels")
    lines = [f"{part.split}: {part.count} {part.kind} of {len(part.patients)} {of_whom}"]
    shares = part.voxels / max(part.voxels.sum(), 1)
    for name, share in zip(("background", *class_names), shares, strict=True):
        warning = "" if share else f"   warning: no {of_what} of this class"
        lines.append(f"  {name:<20} {100 * share:7.3f} % of {of_what}{warning}")
    for doubt, count in part.doubts.items():
        lines.append(f"  warning: {doubt}" + (f" ({count} {part.kind})" if count > 1 else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the full check from the command line; returns the exit status."""
    parser = ArgumentParser(prog="python -m utils.verify", description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--root_path", help="folder of the slices, or of images and masks")
    parser.add_argument("--volume_path", help="folder of the volumes")
    parser.add_argument("--list_dir", help="folder of the lists")
    parser.add_argument("--num_classes", type=int, help="classes with background")
    parser.add_argument("--splits", nargs="+", help="lists; the first is trained on")
    parser.add_argument("--label_order", help="what the label ids of Synapse's files mean; default: paper")
    args = parser.parse_args(argv)
    info = DATASETS[args.dataset]
    num_classes = info.num_classes if args.num_classes is None else args.num_classes
    if num_classes < 2:
        raise DataError(f"--num_classes is {num_classes}; it counts background, so at least 2")
    folders = args.root_path or info.root_path, args.volume_path or info.volume_path, args.list_dir or info.list_dir
    order = info.label_order(args.label_order, num_classes)
    parts, problems = full_check(*folders, args.splits or info.splits, num_classes, info, order)
    for part in parts:
        named = len(part.class_names) == num_classes - 1
        print(format_part(part, part.class_names if named else info.names_for(num_classes)))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found", file=sys.stderr)
        return 1
    where = " ".join(f"--{n} {v}" for n, v in zip(("root_path", "volume_path", "list_dir"), folders, strict=True))
    if info.planar:
        where = f"--root_path {folders[0]} --list_dir {folders[2]}"
    where += f" --label_order {args.label_order}" if args.label_order else f" --num_classes {num_classes}"
    print(f"all is well; next: python {info.train_script} {where}")
    return 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()), DataError)
