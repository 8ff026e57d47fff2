"""Whole volumes of a split, for validation and testing."""

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.errors import DataError
from datasets.label_order import LabelOrder
from datasets.lists import list_path, natural_key, patient_of, select_files
from datasets.volume import Volume, data_name, read_volume, stack_slices

_SLICE = re.compile(r"(?P<volume>.+)_slice(?P<phase>[A-Za-z]*)_?[0-9]+")


class VolumeDataset(Sequence[Volume]):
    """The volumes that a list names, each read and checked when it is asked for.

    volume_path: folder of ``.npy.h5``, ``.h5`` or ``.npz`` volumes, or of slices, which are stacked to their volume
    (MT-UNet's validation part has slices only); a folder of the split's name in it is used in its place. num_classes
    counts the background; label_order turns the ids of other people's files into ours; only: patients of the list, or
    None for all. ``[i]`` gives a Volume; ``names`` are the volumes' names, ``source`` the list. Raises DataError
    for a bad list at once, for a bad file when it is read.
    """

    def __init__(
        self,
        volume_path: str | Path,
        list_dir: str | Path,
        split: str,
        num_classes: int,
        label_order: LabelOrder | None = None,
        only: Sequence[str] | None = None,
    ):
        self.num_classes = num_classes
        self.label_order = label_order
        self.source = list_path(list_dir, split)
        self.files = _group_by_volume(select_files(list_dir, split, volume_path, only=only))
        self.names = list(self.files)

    @property
    def patients(self) -> set[str]:
        """Whose volumes they are."""
        return {patient_of(name) for name in self.names}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Volume:
        name = self.names[index]
        files = self.files[name]
        if _SLICE.fullmatch(data_name(files[0])):
            return stack_slices(name, files, self.num_classes, self.label_order)
        return read_volume(files[0], self.num_classes, self.label_order)


def _group_by_volume(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each volume by its name, in the order of the list: one file, or all its slices in order."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        found = _SLICE.fullmatch(data_name(path))
        name = "_volume_".join(filter(None, found.group("volume", "phase"))) if found else data_name(path)
        files.setdefault(name, []).append(path)
    for name, members in files.items():
        if len(members) > 1 and not all(_SLICE.fullmatch(data_name(path)) for path in members):
            raise DataError(f"{members[0]}: {members[1]} is the same volume {name}; keep one of them")
        members.sort(key=lambda path: natural_key(path.name))
    return files
