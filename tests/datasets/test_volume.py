"""Volumes and slices survive a round trip, and damaged ones are refused with one line."""

import resource
import zipfile

import h5py
import numpy as np
import pytest

from datasets import read_slice, read_volume, write_slice, write_volume


def test_volume_round_trip(tmp_path, make_volume):
    volume = make_volume()
    write_volume(tmp_path / "patient001_frame01.npy.h5", volume)
    back = read_volume(tmp_path / "patient001_frame01.npy.h5", 4)
    assert (back.name, back.spacing, back.class_names) == (volume.name, volume.spacing, volume.class_names)
    np.testing.assert_array_equal(back.image, volume.image)
    np.testing.assert_array_equal(back.label, volume.label)
    np.testing.assert_array_equal(back.affine, volume.affine)
    assert (back.image.dtype, back.label.dtype) == (np.float32, np.uint8)


def test_slice_round_trip(tmp_path, make_volume):
    volume = make_volume()
    write_slice(tmp_path / "s.npz", volume, 2)
    image, label = read_slice(tmp_path / "s.npz", 4)
    np.testing.assert_array_equal(image, volume.image[2])
    np.testing.assert_array_equal(label, volume.label[2])
    with np.load(tmp_path / "s.npz") as file:
        assert tuple(file["class_names"]) == volume.class_names
        assert tuple(file["spacing"]) == volume.spacing


def test_network_input_and_restore(make_volume):
    volume = make_volume(shape=(3, 20, 14))
    assert volume.network_input(32).shape == (3, 1, 32, 32)
    assert volume.network_input(32).dtype == np.float32
    prediction = np.zeros((3, 32, 32), np.uint8)
    prediction[1, 16:, :] = 2
    restored = volume.restore(prediction)
    assert restored.shape == (3, 20, 14)
    assert restored.dtype == np.uint8
    assert (restored[1, 10:] == 2).all()
    assert not restored[1, :10].any()
    assert not restored[[0, 2]].any()


@pytest.mark.parametrize("shape", [(1, 20, 14), (3, 7, 31), (1, 1, 1)])
def test_odd_but_sound_volumes_are_read(tmp_path, make_volume, shape):
    volume = make_volume(shape=shape)
    volume.label[:] = 0
    volume.image[:] = 0.5
    write_volume(tmp_path / "v.h5", volume)
    back = read_volume(tmp_path / "v.h5", 4)
    assert back.image.shape == shape
    assert back.network_input(16).shape == (shape[0], 1, 16, 16)
    assert back.restore(np.zeros((shape[0], 16, 16), np.uint8)).shape == shape


def test_files_without_names_and_geometry_are_read(tmp_path):
    np.savez(tmp_path / "v.npz", img=np.zeros((2, 5, 4)), label=np.ones((2, 5, 4)))
    volume = read_volume(tmp_path / "v.npz", 2)
    assert (volume.spacing, volume.affine, volume.class_names) == (None, None, ())
    assert (volume.image.dtype, volume.label.dtype) == (np.float32, np.uint8)


def _write(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


GOOD = {"image": np.zeros((2, 5, 4), np.float32), "label": np.zeros((2, 5, 4), np.uint8)}
NAN = np.full((2, 5, 4), np.nan, np.float32)
BAD = {
    "no image": ({"label": GOOD["label"]}, "has no 'image'"),
    "no label": ({"image": GOOD["image"]}, "has no 'label'"),
    "unequal shapes": (GOOD | {"label": np.zeros((2, 4, 5), np.uint8)}, "(2, 4, 5)"),
    "too few axes": ({key: array[0] for key, array in GOOD.items()}, "(5, 4)"),
    "too many axes": ({key: array[None] for key, array in GOOD.items()}, "(1, 2, 5, 4)"),
    "empty": ({key: array[:0] for key, array in GOOD.items()}, "(0, 5, 4)"),
    "NaN": (GOOD | {"image": NAN}, "40 values"),
    "infinite": (GOOD | {"image": NAN * 0 + np.inf}, "40 values"),
    "beyond float32": (GOOD | {"image": np.full((2, 5, 4), 1e300)}, "infinite"),
    "fraction": (GOOD | {"label": np.full((2, 5, 4), 0.5)}, "whole numbers"),
    "NaN label": (GOOD | {"label": NAN}, "whole numbers"),
    "id too high": (GOOD | {"label": np.full((2, 5, 4), 4, np.uint8)}, "--num_classes"),
    "id far too high": (GOOD | {"label": np.full((2, 5, 4), 300)}, "300"),
    "negative id": (GOOD | {"label": np.full((2, 5, 4), -1)}, "-1"),
    "complex": (GOOD | {"image": np.zeros((2, 5, 4), complex)}, "complex"),
    "text": (GOOD | {"label": np.full((2, 5, 4), b"a")}, "numbers"),
}


@pytest.mark.parametrize("ending", [".npy.h5", ".npz"])
@pytest.mark.parametrize("case", BAD)
def test_unfit_contents_are_refused(tmp_path, refused, case, ending):
    arrays, words = BAD[case]
    path = tmp_path / f"patient001_frame01{ending}"
    _write(path, **arrays)
    refused(lambda: read_volume(path, 4), path, words)


@pytest.mark.parametrize("ending", [".npy.h5", ".npz"])
def test_unreadable_files_are_refused(tmp_path, refused, make_volume, ending):
    path = tmp_path / f"v{ending}"
    refused(lambda: read_volume(path), path, "no such file", "prepare_data.py")
    path.write_bytes(b"something else\n" * 100)
    refused(lambda: read_volume(path), path, "prepare_data.py")
    path.write_bytes(b"")
    refused(lambda: read_volume(path), path)
    volume = make_volume(shape=(3, 64, 64))
    write_volume(path, volume) if ending == ".npy.h5" else _write(path, image=volume.image, label=volume.label)
    whole = path.read_bytes()
    for share in (0.2, 0.6, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(lambda: read_volume(path), path)


def test_a_damaged_archive_member_is_refused(tmp_path, refused, make_volume):
    path = tmp_path / "s.npz"
    write_slice(path, make_volume(shape=(1, 64, 64)), 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused(lambda: read_slice(path), path)


def test_nothing_is_unpickled(tmp_path, refused):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "s.npz"
    np.savez(path, image=np.array([Trap()], dtype=object), label=np.zeros((5, 4), np.uint8))
    refused(lambda: read_slice(path), path)


def test_an_absurd_declared_size_is_refused_before_reading(tmp_path, refused):
    path = tmp_path / "v.h5"
    with h5py.File(path, "w") as file:
        for key in ("image", "label"):
            file.create_dataset(key, shape=(10**5, 10**5, 10**3), dtype=np.uint8, chunks=(1, 100, 100))
    refused(lambda: read_volume(path), path, "(100000, 100000, 1000)", "GiB")
    path = tmp_path / "s.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }"
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("image", "label"):
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refused(lambda: read_slice(path), path, "GiB")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("spacing", (1.0, 2.0)), ("spacing", (1.0, 0.0, 1.0)), ("affine", np.eye(3)), ("class_names", (1, 2, 3))],
)
def test_unfit_attributes_are_refused(tmp_path, refused, make_volume, attribute, value):
    path = tmp_path / "v.h5"
    write_volume(path, make_volume())
    with h5py.File(path, "a") as file:
        file.attrs[attribute] = value
    refused(lambda: read_volume(path), path, attribute)


def test_a_full_disk_leaves_nothing_and_the_old_file_as_it_was(tmp_path, make_volume):
    volume = make_volume(shape=(3, 100, 100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write, name in ((write_volume, "v.npy.h5"), (lambda path, volume: write_slice(path, volume, 0), "s.npz")):
        old = tmp_path / f"old_{name}"
        old.write_bytes(b"old")
        for path in (tmp_path / name, old):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            try:
                with pytest.raises(OSError) as caught:
                    write(path, volume)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.filename == str(path)
        assert old.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old_s.npz", "old_v.npy.h5"]
