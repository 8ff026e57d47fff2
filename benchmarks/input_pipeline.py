"""How many augmented slices a second the training loader delivers: ``python -m benchmarks.input_pipeline``.

Cardiac slices (``--acdc FOLDER`` of prepared data, else phantoms) and CT slices of 512 x 512 (synthetic), to
256 x 256, in batches of 20 by two workers, from files and from memory; beside the plain way, ``scipy.ndimage.zoom`` of
what is read anew every time. Last, the loader hands out slices as they are, and the device finishes them.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from benchmarks import plain
from benchmarks.measure import machine, markdown, synchronize
from datasets import SliceDataset, Volume
from datasets.phantom import write_phantom
from datasets.transforms import augment
from datasets.volumes import write_slice
from utils.cli import ArgumentParser, run_script

SIZE = 256


class PlainSlices(SliceDataset):
    """Slices that are read, augmented and zoomed anew every time."""

    def __getitem__(self, index: int) -> dict:
        with np.load(self.files[index]) as file:
            image, label = augment(file["image"], file["label"], self.generator(index))
        image, label = plain.zoom_in(image[None], SIZE), plain.zoom_back(label[None], (SIZE, SIZE))[0]
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(label.astype(np.int64))}


def write_ct_slices(folder: Path, count: int) -> None:
    """Write slices of 512 x 512 as preparation writes them, a third of each air."""
    (folder / "lists").mkdir(parents=True)
    (folder / "train_npz").mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512]
    body = ((x - 256) / 240) ** 2 + ((y - 256) / 180) ** 2 < 1
    image = np.where(body, 0.4 + 0.1 * rng.standard_normal((count, 512, 512)), 0).clip(0, 1).astype(np.float32)
    label = np.repeat((9 * ndimage.gaussian_filter(rng.random((1, 512, 512)), (0, 20, 20))).astype(np.uint8), count, 0)
    volume, names = Volume("ct", image, label), [f"case0001_slice{z:03d}" for z in range(count)]
    for z, name in enumerate(names):
        write_slice(folder / "train_npz" / f"{name}.npz", volume, z)
    (folder / "lists" / "train.txt").write_text("\n".join(names) + "\n")


def slices_per_second(dataset: SliceDataset, workers: int, device: torch.device, epochs: int) -> list[float]:
    """Return the rate of each epoch, the workers' start left out."""
    loader = DataLoader(
        dataset, 20, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
         pin_memory=device.type == "cuda",
    )  # fmt: skip
    rates = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        batches = iter(loader)
        next(batches)["image"].to(device)  # the workers have started
        start, count = time.perf_counter(), 0
        for batch in batches:
            count += len(batch["image"].to(device))
        synchronize(device)
        rates.append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--acdc", type=Path, help="folder with train_npz of prepared slices; phantoms without")
    parser.add_argument("--count", type=int, default=600, help="slices of each kind, at most")
    parser.add_argument("--workers", type=int, default=2, help="of the loader")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = torch.device(args.device), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heart = args.acdc or folder / "phantom"
        if args.acdc is None:
            write_phantom(heart, num_patients=(max(args.count // 15, 1), 1, 1))
        files = sorted((heart / "train_npz").glob("*.npz"))[: args.count]
        (folder / "heart").mkdir()
        (folder / "heart" / "train.txt").write_text("".join(f"{path.stem}\n" for path in files))
        write_ct_slices(folder / "ct", args.count // 3)
        for what, root, lists, num_classes in (
            (f"{len(files)} cardiac slices", heart, folder / "heart", 4),
            (f"{args.count // 3} CT slices", folder / "ct", folder / "ct" / "lists", 10),
        ):
            arguments = root / "train_npz", lists, "train", num_classes, SIZE, True
            plainly = min(slices_per_second(PlainSlices(*arguments), args.workers, device, 2))
            from_files, from_memory = (SliceDataset(*arguments) for _ in range(2))
            from_memory.keep(4 * 2**30)
            rates = [min(slices_per_second(d, args.workers, device, 3)) for d in (from_files, from_memory)]
            rows.append([what, *(f"{rate:.0f}" for rate in (plainly, *rates)), f"{rates[1] / plainly:.1f}"])
    print(machine(device))
    print(f"slices a second, the slowest of three epochs, {args.workers} workers, batches of 20, to {SIZE} x {SIZE}")
    print(markdown(["", "plain", "from files", "from memory", "memory / plain"], rows))


if __name__ == "__main__":
    run_script(main)
