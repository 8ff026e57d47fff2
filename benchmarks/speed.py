"""Compare the speed of this code with that of plain code for the same work: ``python -m benchmarks.speed NAME``.

Each benchmark runs its sides in turn in one process, and prints the machine and a table of medians. The plain side is
``benchmarks/plain.py``; the input pipeline has none. All figures depend on the processor and on what else runs; ratios
vary less than times.
"""

import inspect
import tempfile
from argparse import Namespace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import plain
from benchmarks.gpu import Form
from benchmarks.measure import Sides, machine, past_warm_up, peak_memory, time_sides
from datasets import SliceDataset, Volume, write_slice
from networks import DMWLA
from utils.cli import ArgumentParser, run_script
from utils.losses import subset_loss
from utils.metrics import case_metrics
from utils.results import markdown


def network(model_scale="small", num_classes=9, img_size=256, img_size_dmwla=224, batch_size=2, repeats=5):
    """Run the whole network: a forward pass in evaluation, and a training step with loss, AdamW and memory update.

    In evaluation the plain side takes one image at a time. It uses PyTorch's default AdamW, ours the fused one.
    """
    args = Namespace(**locals())
    forms = {side: Form(name, args, torch.device("cpu")) for side, name in (("plain", "plain"), ("ours", "float32"))}
    rows = compare("evaluation", {side: form.evaluation() for side, form in forms.items()}, repeats)
    return rows + compare("training step", {side: form.training_step() for side, form in forms.items()}, repeats)


def dmwla(channels=96, feature_dim=256, side=56, batch_size=4, repeats=9):
    """Run one DMW-LA block: forward, and forward with backward and memory update."""
    ours = DMWLA(channels, feature_dim, num_clusters=9)
    past_warm_up(ours)
    blocks = {"plain": plain.plain_copy(ours), "ours": ours}
    x = torch.randn(batch_size, channels, side, side).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(block: DMWLA) -> None:
        block.eval()(x)

    def step(block: DMWLA) -> None:
        block.zero_grad()
        block.train()(x.detach().requires_grad_()).sum().backward()

    rows = compare("forward", {side: partial(forward, block) for side, block in blocks.items()}, repeats)
    return rows + compare("training step", {side: partial(step, block) for side, block in blocks.items()}, repeats)


def loss(batch_size=4, num_classes=9, img_size=256, repeats=7):
    """Run the subset loss forward and backward, and the softmaxes of its 15 subsets, which every form needs."""
    data = torch.randn(4, batch_size, num_classes, img_size, img_size)
    label = torch.randint(num_classes, (batch_size, img_size, img_size))

    def maps() -> list[Tensor]:
        return [m.requires_grad_() for m in data.detach().unbind()]

    def softmaxes() -> None:
        leaves = maps()
        for subset in (subset for size in range(1, 5) for subset in combinations(leaves, size)):
            share = sum(subset).softmax(1)
            share.backward(share.detach())

    sides = {
        "15 softmaxes": softmaxes,
        "plain": lambda: plain.subset_loss(maps(), label).backward(),
        "ours": lambda: subset_loss(maps(), label).backward(),
    }
    rows = compare("forward and backward", sides, repeats)
    return [row | {"ours / softmaxes": row["ours"] / row["15 softmaxes"]} for row in rows]


def evaluation(slices=150, repeats=1):
    """Score a CT volume of eight organs with medpy and with ours; the prediction is the label, shifted a few voxels."""
    num_classes, label, scores = 9, ct_volume(slices).label, {}
    prediction = np.roll(label, (3, 2), (1, 2))

    def run_ours() -> None:
        scores["ours"] = [c.transunet for c in case_metrics(prediction, label, num_classes)]

    def run_plain() -> None:
        scores["plain"] = plain.metrics(prediction, label, num_classes)

    seconds = time_sides({"plain": run_plain, "ours": run_ours}, repeats, warmup=0)
    difference = np.nanmax(np.abs(np.subtract(scores["plain"], scores["ours"])))
    row = {"": f"{slices} slices of 512 x 512 [s]", **seconds, "plain / ours": seconds["plain"] / seconds["ours"]}
    return [row | {"largest difference of a score": difference}]


def input_pipeline(slices=200, batch_size=20, workers=2, repeats=3):
    """Load an epoch of augmented CT slices at 256 x 256, from files and from memory (``--cache_gib``)."""
    with tempfile.TemporaryDirectory() as folder:
        volume, names = ct_volume(slices), [f"case0001_slice{z:03d}" for z in range(slices)]
        for z, name in enumerate(names):
            write_slice(Path(folder, f"{name}.npz"), volume, z)
        Path(folder, "train.txt").write_text("\n".join(names) + "\n")
        sets = {name: SliceDataset(folder, folder, "train", 9, 256, True) for name in ("from files", "from memory")}
        sets["from memory"].keep(4 * 2**30)
        kept = {"num_workers": workers, "persistent_workers": workers > 0}
        loaders = {name: DataLoader(dataset, batch_size, shuffle=True, **kept) for name, dataset in sets.items()}
        seconds = time_sides({name: partial(list, loader) for name, loader in loaders.items()}, repeats)
        del loaders  # ends the workers before the files are deleted
    return [{"": "slices per second", **{name: slices / value for name, value in seconds.items()}}]


def compare(work: str, sides: Sides, repeats: int) -> list[dict[str, object]]:
    """Return two rows for one piece of work: the time and the peak memory of each side."""
    seconds = time_sides(sides, repeats)
    mebibytes = {side: peak_memory(call) / 2**20 for side, call in sides.items()}
    units = (("s", seconds), ("MiB", mebibytes))
    return [{"": f"{work} [{unit}]", **n, "plain / ours": n["plain"] / n["ours"]} for unit, n in units]


def ct_volume(slices: int) -> Volume:
    """Return a noisy body (slices, 512, 512), surrounded by air, with eight ellipsoids as large as abdominal organs."""
    rng, shape = np.random.default_rng(0), np.array((slices, 512, 512))
    z, y, x = np.ogrid[:slices, :512, :512]
    label = np.zeros(shape, np.uint8)
    for organ in range(1, 9):
        centre, radii = rng.uniform(0.3, 0.7, 3) * shape, rng.uniform(0.04, 0.17, 3) * shape
        label[sum(((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radii, strict=True)) < 1] = organ
    image = 0.3 + label / 20 + 0.06 * rng.standard_normal(shape, np.float32)
    body = ((x - 256) / 240) ** 2 + ((y - 256) / 180) ** 2 < 1
    return Volume("case0001", np.where(body, image, 0).clip(0, 1).astype(np.float32), label)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for benchmark in (network, dmwla, loss, evaluation, input_pipeline):
        text = inspect.getdoc(benchmark)
        flags = names.add_parser(benchmark.__name__, help=text.split("\n")[0], description=text)
        flags.set_defaults(benchmark=benchmark)
        for name, parameter in inspect.signature(benchmark).parameters.items():
            default = parameter.default
            flags.add_argument(f"--{name}", type=type(default), default=default, help=name.replace("_", " "))
        flags.add_argument("--threads", type=int, default=2)
    args = vars(parser.parse_args())
    benchmark, threads = args.pop("benchmark"), args.pop("threads")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    table = pd.DataFrame(benchmark(**args))
    print(f"{machine()}\n{benchmark.__name__}: {', '.join(f'{name} {value}' for name, value in args.items())}\n")
    print(markdown(table, ".4g"))


if __name__ == "__main__":
    run_script(main)
