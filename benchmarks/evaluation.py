"""What evaluating volumes costs beside the forward passes: ``python -m benchmarks.evaluation``.

From files to a table: read, resize, (forward), resize back, metrics, CSV, of cardiac volumes (``--acdc FOLDER`` of h5
volumes, else phantoms) and of a CT phantom. Labels shifted by some voxels stand for predictions, so that both sides
score the same and no network is timed. The plain way: ``scipy.ndimage.zoom`` per slice and medpy on the full volumes.
"""

import csv
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from scipy import ndimage

from benchmarks import plain
from benchmarks.measure import machine, markdown
from datasets import Volume, read_volume
from datasets.phantom import write_phantom
from datasets.volumes import write_volume
from utils.cli import ArgumentParser, run_script
from utils.evaluation import evaluate
from utils.metrics import Metrics
from utils.results import case_table, summarise, write_cases

SIZE = 256


class Shift(torch.nn.Module):
    """A network that costs nothing: its prediction is the label of the volume, shifted."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.predictions = torch.zeros(0)

    def expect(self, label: np.ndarray) -> None:
        """Make ready for the slices of a volume."""
        rows, columns = (np.arange(SIZE) * n // SIZE for n in label.shape[1:])
        shifted = np.roll(label, (3, 2), (1, 2))[:, rows[:, None], columns]
        self.predictions = torch.from_numpy(shifted)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return one map (B, num_classes, S, S) that decides as expected."""
        now, self.predictions = self.predictions.split([len(x), len(self.predictions) - len(x)])
        return [(now[:, None] == torch.arange(self.num_classes)[:, None, None]).half()]


class Files:
    """The volumes of a list of files, which tell the network what to predict as they are read."""

    def __init__(self, paths: list[Path], network: Shift):
        self.paths, self.network = paths, network

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Volume:
        volume = read_volume(self.paths[index])
        self.network.expect(volume.label)
        return volume


def evaluate_ours(paths: list[Path], num_classes: int, table: Path) -> list[list[Metrics]]:
    """Evaluate as the test scripts do; returns the metrics of each case and class, in voxels."""
    network = Shift(num_classes)
    results = evaluate(network, Files(paths, network), num_classes, SIZE, batch_size=20)
    cases = case_table(results, [f"class {c}" for c in range(1, num_classes)])
    summarise(cases)
    write_cases(table, cases)
    return [[c.transunet for c in result.classes] for result in results]


def evaluate_plainly(paths: list[Path], num_classes: int, table: Path) -> list[list[Metrics]]:
    """Do the same without thinking about speed."""
    network, results = Shift(num_classes), []
    for path in paths:
        with h5py.File(path) as file:
            image, label = file["image"][()], file["label"][()]
        network.expect(label)
        slices = plain.zoom_in(image, SIZE)
        prediction = np.stack([network(torch.from_numpy(s[None, None]))[0].argmax(1)[0].numpy() for s in slices])
        prediction = plain.zoom_back(prediction.astype(np.uint8), label.shape[1:])
        results.append([Metrics(*m) for m in plain.metrics(prediction, label, num_classes)])
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([path.name, *np.ravel(result)] for path, result in zip(paths, results, strict=True))
    return results


def write_ct(path: Path, slices: int, organs: int = 8) -> None:
    """Write a noisy CT phantom of 512 x 512 pixels with organs of the sizes of abdominal ones."""
    rng = np.random.default_rng(0)
    label = np.zeros((slices, 512, 512), np.uint8)
    z, y, x = np.ogrid[:slices, :512, :512]
    for organ in range(1, organs + 1):
        centre = rng.uniform(0.3, 0.7, 3) * label.shape
        radii = np.array((slices, 512, 512)) * rng.uniform(0.04, 0.17)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radii, strict=True)) < 1
        label[inside] = organ
    image = label / organs + ndimage.gaussian_filter(rng.normal(0, 1, label.shape), (0, 1, 1))
    write_volume(path, Volume("ct", image.astype(np.float32), label))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--acdc", type=Path, help="folder of h5 volumes; phantoms without")
    parser.add_argument("--count", type=int, default=40, help="how many of them")
    parser.add_argument("--slices", type=int, default=150, help="of the CT phantom")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.acdc is None:
            write_phantom(folder, num_patients=(1, 1, args.count // 2))
        heart = sorted((args.acdc or folder / "test_vol_h5").glob("*.h5"))[: args.count]
        write_ct(folder / "ct.npy.h5", args.slices)
        kind = "phantom" if args.acdc is None else "ACDC"
        for what, paths, num_classes in (
            (f"{len(heart)} {kind} volumes", heart, 4),
            (f"CT phantom 512 x 512 x {args.slices}, 8 organs", [folder / "ct.npy.h5"], 9),
        ):
            seconds, results = {}, {}
            for side, run in (("plain", evaluate_plainly), ("ours", evaluate_ours)):
                start = time.perf_counter()
                results[side] = run(paths, num_classes, folder / f"{side}.csv")
                seconds[side] = time.perf_counter() - start
            found = ~np.isnan(np.array(results["plain"]))
            difference = np.abs(np.array(results["plain"]) - np.array(results["ours"]))[found].max()
            ratio = seconds["plain"] / seconds["ours"]
            rows.append([what, f"{seconds['plain']:.1f} s", f"{seconds['ours']:.2f} s", f"{ratio:.1f}",
                         f"{difference:.1e}"])  # fmt: skip
    print(machine())
    print(markdown(["", "plain", "ours", "ratio", "largest difference of a metric"], rows))


if __name__ == "__main__":
    run_script(main)
