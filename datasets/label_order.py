"""Which organ each label id of a file means, for data sets whose files circulate in more than one order."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError, brief
from datasets.storage import checked_label


@dataclass(frozen=True)
class LabelOrder:
    """The classes of other people's files, and ours.

    name: as the user gives it with ``--label_order``; file_classes: what id 1, 2, ... of a file mean;
    class_names: what they mean to us. Classes that are not ours become background.
    """

    name: str
    file_classes: tuple[str, ...]
    class_names: tuple[str, ...]

    def apply(self, path: str | Path, label: np.ndarray, shape: tuple[int, ...], names: tuple[str, ...]) -> np.ndarray:
        """Return a file's label with our ids, uint8.

        path: for messages; shape: of the image; names: the classes that the file itself names, or none. Raises
        DataError for an id beyond the order's, and for a file that says it has another order.
        """
        if names and names != self.file_classes:
            raise DataError(
                f"{path}: names its classes {brief(', '.join(names))}, but --label_order {self.name} is "
                f"{self.described()}: give the order that the file has"
            )
        try:
            label = checked_label(path, label, shape, len(self.file_classes) + 1)
        except DataError as error:
            raise DataError(f"{error} (ids were taken as --label_order {self.name}, {self.described()})") from error
        return self._ids()[label]

    def described(self) -> str:
        """Return the classes in order, as text."""
        return ", ".join(f"{index} {name}" for index, name in enumerate(self.file_classes, 1))

    def _ids(self) -> np.ndarray:
        """Return our id for each id of a file, background included."""
        ours = {name: index for index, name in enumerate(self.class_names, 1)}
        return np.array([0, *(ours.get(name, 0) for name in self.file_classes)], np.uint8)
