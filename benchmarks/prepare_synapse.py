"""How long one CT takes to prepare, beside the plain way: ``python -m benchmarks.prepare_synapse``.

A synthetic case of 512 x 512 x 150 in BTCV's layout, on one process. The plain way reads it as double precision, clips,
maps labels and writes with numpy's and h5py's usual compression. Both write the same slices and volume.
"""

import tempfile
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
from scipy import ndimage

from datasets import read_volume, synapse
from utils.cli import ArgumentParser, run_script


def write_raw(folder: Path, slices: int) -> None:
    """Write a body of smooth organs under noise, surrounded by air, with two labels."""
    rng = np.random.default_rng(0)
    image = ndimage.zoom(rng.normal(0, 200, (16, 16, 10)), (32, 32, slices / 10), order=1)
    image += rng.normal(0, 25, image.shape)
    y, x = np.mgrid[:512, :512]
    image[((x - 256) / 240) ** 2 + ((y - 256) / 180) ** 2 > 1] = -1000
    label = np.zeros(image.shape, np.uint8)
    label[100:200, 100:300, slices // 8 : slices // 2] = 6
    label[250:300, 200:260, slices // 8 : slices // 2] = 1
    for kind, array in (("img", image.astype(np.int16)), ("label", label)):
        (folder / kind).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-0.8, 0.8, 3, 1])), folder / kind / f"{kind}0001.nii.gz")


def prepare_plainly(raw: Path, out: Path) -> None:
    """Do the same without thinking about speed."""
    image = nibabel.load(raw / "img" / "img0001.nii.gz").get_fdata().transpose(2, 1, 0)
    raw_label = nibabel.load(raw / "label" / "label0001.nii.gz").get_fdata().transpose(2, 1, 0)
    low, high = synapse.WINDOW
    image = ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    for index, name in enumerate(synapse.FILE_CLASSES["btcv13"], 1):
        if name in synapse.CLASS_NAMES:
            label[raw_label == index] = 1 + synapse.CLASS_NAMES.index(name)
    out.mkdir()
    for z in range(len(image)):
        np.savez_compressed(out / f"case0001_slice{z:03d}.npz", image=image[z], label=label[z])
    with h5py.File(out / "case0001.npy.h5", "w") as file:
        file.create_dataset("image", data=image, compression="gzip")
        file.create_dataset("label", data=label, compression="gzip")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=150, help="of the case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, ours, plain = (Path(folder) / name for name in ("raw", "ours", "plain"))
        write_raw(raw, args.slices)
        start = time.perf_counter()
        synapse.prepare(raw, ours)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        prepare_plainly(raw, plain)
        plain_seconds = time.perf_counter() - start
        with h5py.File(plain / "case0001.npy.h5") as file:
            same = read_volume(ours / "test_vol_h5" / "case0001.npy.h5")
            assert np.abs(same.image - file["image"][()]).max() < 1e-6 and (same.label == file["label"][()]).all()
        sizes = [sum(p.stat().st_size for p in top.rglob("*") if p.is_file()) / 2**20 for top in (ours, plain)]
    print(f"prepared in {seconds:.1f} s, {sizes[0]:.0f} MiB; the plain way {plain_seconds:.1f} s, {sizes[1]:.0f} MiB")
    print(f"{plain_seconds / seconds:.1f} times faster")


if __name__ == "__main__":
    run_script(main)
