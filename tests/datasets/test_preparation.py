"""What all preparations share: an interrupted one continues where it stopped."""

import itertools
import shutil
from contextlib import contextmanager
from functools import partial

import pytest

from datasets import acdc, preparation, segpc, volumes
from datasets.files import atomic_write
from tests.datasets.test_acdc_preparation import write_patient
from tests.datasets.test_segpc import CELLS, files, write_raw


def interrupted(stop):
    """Return an atomic_write for which the disk is full in the middle of its ``stop``-th file."""
    calls = itertools.count(1)

    @contextmanager
    def write(path):
        with atomic_write(path) as temporary:
            if next(calls) == stop:
                temporary.write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
            yield temporary

    return write


@pytest.mark.parametrize("kind", ["scans", "images", "crops"])
def test_an_interrupted_preparation_continues_where_it_stopped(tmp_path, monkeypatch, kind):
    raw, out = tmp_path / "raw", tmp_path / "out"
    if kind == "scans":
        write_patient(raw, 1)
        prepare, last, stops = acdc.prepare, "test_vol_h5/*", (2, 5, 7)  # of 2 x (4 slices and a volume)
    else:
        write_raw(raw, ["1", "2"], CELLS[:2])
        prepare, last = partial(segpc.prepare, crops=kind == "crops"), "masks/*"
        stops = range(1, 9 if kind == "crops" else 5)  # an image and a mask of each

    def fail(stop, **options):
        for module in (preparation, volumes):
            monkeypatch.setattr(module, "atomic_write", interrupted(stop))
        with pytest.raises(OSError, match="No space left"):
            prepare(raw, out, **options)
        monkeypatch.undo()

    names = prepare(raw, tmp_path / "whole")
    for stop in stops:
        shutil.rmtree(out, ignore_errors=True)
        fail(stop)
        assert len(files(out)) == stop - 1
        before = {path: path.stat().st_mtime_ns for path in out.glob(last)}
        prepare(raw, out)
        assert files(out) == files(tmp_path / "whole")
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # finished cases are skipped
    fail(2, overwrite=True)
    assert not list(out.glob(last.replace("*", f"{names[0]}.*")))  # nothing old beside something new
