"""Files appear whole or not at all."""

import errno

import pytest

from datasets.files import atomic_write, check_writable, file_stem


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
