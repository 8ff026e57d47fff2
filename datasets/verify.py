"""Check a prepared data set before a network is trained on it.

    python -m datasets.verify acdc
    python -m datasets.verify acdc --splits train val          # where the test volumes are not at hand
    python -m datasets.verify phantom --root_path data/phantom/train_npz --volume_path data/phantom/test_vol_h5 \\
        --list_dir data/phantom/lists

The first split is read as the slices to train on, the others as volumes. Exits with status 1 where anything is wrong.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets import acdc
from datasets.errors import DataError
from datasets.lists import list_path, patient_of, read_list, select_files
from datasets.volume import Volume, read_slice
from datasets.volumes import VolumeDataset
from utils.cli import ArgumentParser, run_script

DEFAULT_FOLDERS = {
    "acdc": ("data/ACDC/train_npz", "data/ACDC/test_vol_h5", "lists/lists_ACDC"),
    "phantom": ("data/phantom/train_npz", "data/phantom/test_vol_h5", "data/phantom/lists"),
}


@dataclass
class Part:
    """What a split holds: its files or volumes, their patients, and the voxels of each class."""

    split: str
    kind: str
    count: int = 0
    patients: set[str] = field(default_factory=set)
    voxels: np.ndarray | int = 0
    class_names: tuple[str, ...] = ()


def quick_check(
    root_path: str | Path,
    volume_path: str | Path,
    list_dir: str | Path,
    splits: Mapping[str, str],
    num_classes: int,
    how_to_get: str = "",
) -> None:
    """Do what training does first, in under a second: folders, lists, patients, first and last case of each split.

    root_path: folder of the slices; volume_path: folder of the volumes; splits: the names of the lists to train on
    and to validate on, under ``train`` and ``val``; how_to_get: what to do where a folder is missing. A list ``test``
    beside them must not share a patient with them either. Raises DataError for the first thing that is wrong.
    """
    for folder in (root_path, volume_path):
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; {how_to_get or 'prepare the data first (prepare_data.py)'}")
    names = list(dict.fromkeys(splits.values()))
    if len(names) < len(splits):
        raise DataError(f"{list_path(list_dir, names[0])}: the same list for training and validation; choose two")
    test = ["test"] if "test" not in names and list_path(list_dir, "test").is_file() else []
    for problem in _shared_patients(list_dir, names + test):
        raise DataError(problem)
    slices = select_files(list_dir, splits["train"], root_path, endings=(".npz",))
    volumes = VolumeDataset(volume_path, list_dir, splits["val"], num_classes)
    for index in (0, -1):
        read_slice(slices[index], num_classes)
        _check_class_names(volumes, index)


def full_check(
    root_path: str | Path, volume_path: str | Path, list_dir: str | Path, splits: Sequence[str], num_classes: int
) -> tuple[list[Part], list[str]]:
    """Read every file of every split, the first as slices and the others as volumes.

    Returns (what each split holds, what is wrong, one line each).
    """
    problems, parts, readable = [], [], []
    for index, split in enumerate(splits):
        part = Part(split, "volumes" if index else "slices", voxels=np.zeros(num_classes, np.int64))
        try:
            if index:
                volumes = VolumeDataset(volume_path, list_dir, split, num_classes)
                labels, names = _volume_labels(volumes, part, problems), volumes.names
            else:
                files = select_files(list_dir, split, root_path, endings=(".npz",))
                labels, names = _slice_labels(files, num_classes, problems), [file.name for file in files]
        except DataError as error:
            problems.append(str(error))
            continue
        for label in tqdm(labels, total=len(names), desc=f"{split}, {part.kind}", disable=None, leave=False):
            part.voxels += np.bincount(label.ravel(), minlength=num_classes)
        part.count = len(names)
        part.patients = {patient_of(name) for name in names}
        parts.append(part)
    for split in splits:
        try:
            read_list(list_dir, split)
        except DataError:
            continue  # said above
        readable.append(split)
    return parts, problems + _shared_patients(list_dir, readable)


def _slice_labels(files: Sequence[Path], num_classes: int, problems: list[str]) -> Iterator[np.ndarray]:
    for file in files:
        try:
            yield read_slice(file, num_classes)[1]
        except DataError as error:
            problems.append(str(error))


def _volume_labels(volumes: VolumeDataset, part: Part, problems: list[str]) -> Iterator[np.ndarray]:
    for index in range(len(volumes)):
        try:
            volume = _check_class_names(volumes, index)
        except DataError as error:
            problems.append(str(error))
            continue
        part.class_names = part.class_names or volume.class_names
        yield volume.label


def _check_class_names(volumes: VolumeDataset, index: int) -> Volume:
    """Return a volume whose class names, if it has any, are as many as its classes, or raise DataError."""
    volume = volumes[index]
    if volume.class_names and len(volume.class_names) != volumes.num_classes - 1:
        raise DataError(
            f"{volumes.files[volume.name][0]}: names {len(volume.class_names)} classes "
            f"({', '.join(volume.class_names)}), but num_classes is {volumes.num_classes} with background; "
            f"set --num_classes {len(volume.class_names) + 1}"
        )
    return volume


def _shared_patients(list_dir: str | Path, splits: Sequence[str]) -> list[str]:
    """Return one line for every patient that two lists name."""
    problems, home = [], {}
    for split in splits:
        for patient in sorted({patient_of(entry) for entry in read_list(list_dir, split)}):
            if home.setdefault(patient, split) != split:
                problems.append(
                    f"{list_path(list_dir, split)}: {patient} is also in {list_path(list_dir, home[patient]).name}; "
                    "take it out of one of them"
                )
    return problems


def format_part(part: Part, class_names: Sequence[str]) -> str:
    """Return what a split holds as text: counts, and the voxel share of each class by name."""
    lines = [f"{part.split}: {part.count} {part.kind} of {len(part.patients)} patients"]
    shares = part.voxels / max(part.voxels.sum(), 1)
    for name, share in zip(("background", *class_names), shares, strict=True):
        warning = "" if share else "   warning: not one voxel of this class"
        lines.append(f"  {name:<20} {100 * share:7.3f} % of voxels{warning}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the full check from the command line; returns the exit status."""
    parser = ArgumentParser(prog="python -m datasets.verify", description=__doc__)
    parser.add_argument("dataset", choices=DEFAULT_FOLDERS)
    parser.add_argument("--root_path", help="folder of the slices")
    parser.add_argument("--volume_path", help="folder of the volumes")
    parser.add_argument("--list_dir", help="folder of the lists")
    parser.add_argument("--num_classes", type=int, default=acdc.NUM_CLASSES, help="classes with background")
    parser.add_argument("--splits", nargs="+", default=["train", "val", "test"], help="lists; the first is trained on")
    args = parser.parse_args(argv)
    if args.num_classes < 2:
        raise DataError(f"--num_classes is {args.num_classes}; it counts background, so at least 2")
    root, volumes, lists = DEFAULT_FOLDERS[args.dataset]
    root, volumes, lists = args.root_path or root, args.volume_path or volumes, args.list_dir or lists
    parts, problems = full_check(root, volumes, lists, args.splits, args.num_classes)
    fallback = acdc.CLASS_NAMES
    if len(fallback) != args.num_classes - 1:
        fallback = tuple(f"class {index}" for index in range(1, args.num_classes))
    for part in parts:
        named = len(part.class_names) == args.num_classes - 1
        print(format_part(part, part.class_names if named else fallback))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found", file=sys.stderr)
        return 1
    where = f"--root_path {root} --volume_path {volumes} --list_dir {lists} --num_classes {args.num_classes}"
    print(f"all is well; next: python train_acdc.py {where}")
    return 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()), DataError)
