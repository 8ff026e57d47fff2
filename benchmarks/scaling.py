"""What one DMW-LA block costs as map, clusters and columns grow: ``python -m benchmarks.scaling``.

Writes a plot of the measured times over the arithmetic that the specification implies: multiply-adds of the projections
(N c d), the global interaction (N^2 e twice), the intra-cluster one (N n e twice, n all columns) and the update (N d
num_clusters, n d), with e = min(c, d) for attention and batch 1. Where the curves run parallel, no term is worse.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.dmwla import forward, step
from benchmarks.measure import add_timing, machine, markdown, past_warm_up, time_sides
from datasets.files import atomic_write
from networks import DMWLA
from utils.cli import ArgumentParser, run_script

SIDES = (14, 20, 28, 40, 56, 80, 112)
CLUSTERS = (2, 4, 8, 16, 32, 64)
COLUMNS = (25, 50, 100, 200, 400)


def multiply_adds(side: int, clusters: int, columns: int, c: int, d: int) -> float:
    """Return what the specification's arithmetic comes to for one map, in multiply-adds."""
    tokens, pool, e = side * side, clusters * columns, min(c, d)
    projections = 4 * tokens * c * min(c, d) + tokens * c * d  # the four linear maps, and the keys
    return projections + 2 * tokens * tokens * e + 2 * tokens * pool * e + tokens * d * clusters + pool * d


def measure(settings: Sequence[tuple[int, int, int]], c: int, d: int, repeats: int) -> list[dict[str, float]]:
    """Return the seconds of forward and of step for each (side, clusters, columns)."""
    rows = []
    for side, clusters, columns in settings:
        torch.manual_seed(0)
        block = DMWLA(c, d, clusters, columns, replaced_columns=columns // 2)
        past_warm_up(block)
        x = torch.randn(1, c, side, side).contiguous(memory_format=torch.channels_last)
        calls = {"forward": lambda b=block, x=x: forward(b, x), "step": lambda b=block, x=x: step(b, x)}
        rows.append(time_sides(calls, repeats))
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=96, help="width c")
    parser.add_argument("--feature_dim", type=int, default=256, help="memory width d")
    add_timing(parser, repeats=5)
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from matplotlib.figure import Figure

    c, d = args.channels, args.feature_dim
    sweeps = {
        "tokens H W": ([side * side for side in SIDES], [(side, 9, 100) for side in SIDES]),
        "clusters": (CLUSTERS, [(28, clusters, 100) for clusters in CLUSTERS]),
        "columns per cluster": (COLUMNS, [(28, 9, columns) for columns in COLUMNS]),
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    rows = []
    for axes, (what, (values, settings)) in zip(figure.subplots(1, 3, sharey=True), sweeps.items(), strict=True):
        seconds = measure(settings, c, d, args.repeats)
        work = [multiply_adds(*setting, c, d) for setting in settings]
        for kind in ("forward", "step"):
            axes.loglog(values, [1000 * s[kind] for s in seconds], "o-", label=kind)
            # The arithmetic at the speed of the largest setting.
            axes.loglog(values, [1000 * seconds[-1][kind] * w / work[-1] for w in work], "k:", linewidth=1)
        axes.set_xlabel(what)
        for value, s, w in zip(values, seconds, work, strict=True):
            rows.append([what, value, f"{w / 1e6:.0f} M", f"{1000 * s['forward']:.1f} ms", f"{1000 * s['step']:.1f} ms",
                         f"{2 * w / s['forward'] / 1e9:.0f}"])  # fmt: skip
        axes.set_title(f"{settings[0]} to {settings[-1]}", fontsize=8)
    figure.axes[0].set_ylabel("ms (dotted: in proportion to the arithmetic)")
    figure.axes[0].legend(frameon=False)
    with atomic_write(args.output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(machine())
    print(f"one DMW-LA block, c {c}, d {d}, batch 1, float32; else 28 x 28, 9 clusters of 100 columns")
    print(markdown(["", "value", "multiply-adds", "forward", "step", "GFLOP/s of the forward"], rows))
    print(args.output)


if __name__ == "__main__":
    run_script(main)
