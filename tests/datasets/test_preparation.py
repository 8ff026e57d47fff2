"""Files appear whole or not at all, and an interrupted preparation continues where it stopped."""

import errno
import itertools
import shutil
from contextlib import contextmanager
from functools import partial

import pytest

from datasets import acdc, image_files, preparation, segpc, volumes
from datasets.files import atomic_write, check_writable, file_stem
from tests.conftest import files
from tests.datasets.test_acdc_preparation import write_patient
from tests.datasets.test_segpc import CELLS, write_raw


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "table.nii.gz"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent and temporary.name.endswith(".nii.gz")
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_the_former_file_as_it_was(tmp_path, error):
    target = tmp_path / "table.csv"
    target.write_text("former")
    with pytest.raises(type(error)) as caught, atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "former"
    assert list(tmp_path.iterdir()) == [target]
    assert not isinstance(error, OSError) or caught.value.filename == str(target)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", ".", "", "a\\b", "a\0b", "~/x", "c:x", "-\n"])
def test_a_stem_is_one_harmless_part_of_a_path(tmp_path, name):
    path = tmp_path / f"{file_stem(name)}_pred.png"
    path.touch()
    assert path.resolve().parent == tmp_path.resolve()
    assert not path.name.startswith(".")
    assert file_stem("patient001_frame01.v2-é") == "patient001_frame01.v2-é"


def test_a_folder_is_known_to_be_writable_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "folder")


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
        calls = itertools.count(1)

        @contextmanager
        def full_in_the_middle_of_a_file(path):
            with atomic_write(path) as temporary:
                if next(calls) == stop:
                    temporary.write_bytes(b"half of it")
                    raise OSError(errno.ENOSPC, "No space left on device")
                yield temporary

        for module in (preparation, volumes, image_files):
            monkeypatch.setattr(module, "atomic_write", full_in_the_middle_of_a_file)
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
