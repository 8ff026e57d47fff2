"""Small volumes and folders for the tests of this room."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets import DataError, Volume
from datasets.acdc import CLASS_NAMES
from datasets.preparation import write_prepared

REAL_ACDC = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ACDC" / "volumes"


@pytest.fixture
def make_volume() -> Callable[..., Volume]:
    """Make a volume in which every voxel's brightness is its own, so that no turn or flip goes unseen."""

    def make(name: str = "patient001_frame01", shape: tuple[int, int, int] = (3, 20, 14)) -> Volume:
        rng = np.random.default_rng(sum(name.encode()))
        image = (rng.permutation(np.prod(shape)) + 1).reshape(shape).astype(np.float32)
        label = rng.integers(0, 4, shape).astype(np.uint8)
        return Volume(name, image / image.max(), label, (8.0, 1.5, 1.25), np.diag([1.25, 1.5, 8.0, 1.0]), CLASS_NAMES)

    return make


@pytest.fixture
def prepared(tmp_path: Path, make_volume) -> Path:
    """A prepared data set: patients 1 and 2 for training, 3 for validation, 4 for test, two frames each."""
    out = tmp_path / "prepared"
    parts = {"train": (1, 2), "val": (3,), "test": (4,)}
    (out / "lists").mkdir(parents=True)
    for part, patients in parts.items():
        (out / "lists" / f"{part}.txt").write_text("".join(f"patient{patient:03d}\n" for patient in patients))
        for patient in patients:
            for frame in (1, 9):
                write_prepared(make_volume(f"patient{patient:03d}_frame{frame:02d}"), out)
    return out


@pytest.fixture
def refused() -> Callable[..., str]:
    """Call a function, expect a DataError of one line in which all the words stand, and return the line."""

    def check(function: Callable, *words: object) -> str:
        with pytest.raises(DataError) as caught:
            function()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message
        return message

    return check
