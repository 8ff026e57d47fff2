"""Whole volumes of a split, for validation and testing."""

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.errors import DataError
from datasets.lists import natural_key, select_files
from datasets.volume import Volume, data_name, read_volume, stack_slices

_SLICE = re.compile(r"(?P<volume>.+)_slice(?P<phase>[A-Za-z]*)_?[0-9]+")


class VolumeDataset(Sequence[Volume]):
    """The volumes that a list names, each read and checked when it is asked for.

    volume_path: folder of ``.npy.h5``, ``.h5`` or ``.npz`` volumes, or of slices, which are stacked to their volume
    (MT-UNet's validation part has slices only); a folder of the split's name in it is used in its place. num_classes
    counts the background. ``[i]`` gives a Volume; ``names`` are the volumes' names. Raises DataError for a bad list at
    once, for a bad file when it is read.
    """

    def __init__(self, volume_path: str | Path, list_dir: str | Path, split: str, num_classes: int):
        self.num_classes = num_classes
        self.files = _group_by_volume(select_files(list_dir, split, volume_path))
        self.names = list(self.files)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Volume:
        name = self.names[index]
        files = self.files[name]
        if _SLICE.fullmatch(data_name(files[0])):
            return stack_slices(name, files, self.num_classes)
        return read_volume(files[0], self.num_classes)


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
