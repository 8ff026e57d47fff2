"""Configurations trained and tested over several seeds, one row of a table each: ``python -m benchmarks.ablation``.

Every part of the paper left out in turn, on ACDC; what follows ``--`` goes to every training:
    python -m benchmarks.ablation --preset parts --seeds 2222 1 2 --output_dir runs/parts -- --amp bf16
The networks to compare with, or some of them, on another set:
    python -m benchmarks.ablation --preset networks --rows sim_mpnet unet --dataset isic --output_dir runs/networks
A flag that goes to every training is left out of a row whose network does not take it.
Called again it goes on: what is tested is not done anew, what was interrupted is resumed. The folder then holds each
run with its results, ``<row>/seed_<seed>``, the scores of them all, those of earlier calls with the same
flags too, ``runs.csv``, and their means, ``table.md``.
"""

import csv
import json
import logging
import shlex
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.measure import machine, markdown
from datasets import DATASETS
from datasets.files import atomic_write
from networks import NETWORKS
from utils.arguments import flags_of_others
from utils.cli import ArgumentParser, run_script
from utils.errors import RunError

logger = logging.getLogger("ablation")

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    "parts": {
        "whole": "",
        "without DMW-LA": "--attention plain",
        "without global interaction": "--attention intra_cluster",
        "without W-LD": "--wld none",
        "without DS-GIM": "--dsgim none",
        "without cosine similarity": "--dsgim euclidean",
        "without Euclidean distance": "--dsgim cosine",
        "without DMW-LA encoder": "--encoders maxvit",
        "without MaxViT encoder": "--encoders dmwla --pretrained none",
        "without gate": "--gate none",
        "without subset loss": "--loss last",
    },
    "columns": {
        f"M {m}": f"--columns_per_cluster {m} --replaced_columns {m // 2} --wld none" for m in (25, 50, 100, 200)
    },
    "replaced": {f"K {k}": f"--replaced_columns {k} --wld none" for k in (0, 25, 50, 75, 100)},
    "clusters": {f"{n} clusters": f"--num_clusters {n} --decoder_num_clusters {n}" for n in (2, 4, 8, 16)},
    "variants": {name: f"--variant {name} --select val --select_from_epoch 1" for name in ("paper", "release")},
    "networks": {name: f"--network {name}" for name in NETWORKS},
}
"""For each choice of ``--preset`` its rows: what the table calls them, and the flags of ``train_<set>.py``."""
SCORES = ("dice", "hd95", "jaccard", "assd")
SETS = [name for name, info in DATASETS.items() if info.train_script == f"train_{name}.py"]


def train_and_test(folder: Path, flags: list[str], args: Namespace) -> None:
    """Train and test one configuration, from where an earlier call left it.

    Raises:
        RunError: the folder holds a run with other flags, or a script has failed.
    """
    summary, typed = folder / f"results_{args.split}" / "summary.json", folder / "flags.txt"
    before = typed.read_text(encoding="utf-8") if typed.exists() else shlex.join(flags)
    if before != shlex.join(flags):
        raise RunError(f"{folder} was trained with {before}, not {shlex.join(flags)}: take another --output_dir")
    if summary.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    typed.write_text(shlex.join(flags), encoding="utf-8")
    last = folder / "last.pth"
    _run(f"train_{args.dataset}.py", *(["--resume", last] if last.exists() else [*flags, "--output_dir", folder]))
    trained_with = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
    data = "volume_path" if "volume_path" in trained_with else "root_path"
    same = [data, "list_dir", "label_order", "device", "n_gpu", "amp"]
    same = [word for name in same if trained_with.get(name) is not None for word in (f"--{name}", trained_with[name])]
    _run(f"test_{args.dataset}.py", "--checkpoint", folder / "best.pth", "--split", args.split, *same)


def fitting(flags: list[str], row: str) -> list[str]:
    """Return those of the flags, each with its values, that the network of a row takes."""
    words = [*flags, *shlex.split(row)]
    network = words[words.index("--network") + 1] if "--network" in words else next(iter(NETWORKS))
    foreign, kept, takes = flags_of_others().get(network, ()), [], True
    for word in flags:
        if word.startswith("--"):
            takes = word[2:].split("=")[0] not in foreign
        if takes:
            kept.append(word)
    return kept


def _run(script: str, *flags: object) -> None:
    logger.info("%s %s", script, shlex.join(map(str, flags)))
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which a terminal sends to the script too, and it saves what it has
        process.wait()
        logger.warning("the same command goes on with this row")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise RunError(f"{script} ended with status {status}, for the reason above: mend it and call this again")


def run_of(row: str, seed: object, args: Namespace) -> tuple[Path, list[str]]:
    """Return the folder and the flags of a row's run."""
    flags = PRESETS[args.preset][row]
    folder = args.output_dir / row.replace(" ", "_") / f"seed_{seed}"
    return folder, [*fitting(args.flags, flags), *shlex.split(flags), "--seed", str(seed)]


def tested(args: Namespace) -> dict[str, dict[int, Path]]:
    """Return the summaries, of this and of earlier calls with the same flags, by row and seed."""
    found: dict[str, dict[int, Path]] = {}
    for row in PRESETS[args.preset]:
        seeds = (int(path.name.removeprefix("seed_")) for path in run_of(row, "*", args)[0].parent.glob("seed_*"))
        for seed in sorted(seeds):
            folder, flags = run_of(row, seed, args)
            summary, typed = folder / f"results_{args.split}" / "summary.json", folder / "flags.txt"
            if summary.exists() and typed.exists() and typed.read_text(encoding="utf-8") == shlex.join(flags):
                found.setdefault(row, {})[seed] = summary
    return found


def collect(folder: Path, summaries: dict[str, dict[int, Path]], what: str) -> str:
    """Write ``runs.csv`` and ``table.md`` of each row's summaries by seed; returns the table."""
    lines, table = [], []
    unit = "voxels"
    for row, of_seeds in summaries.items():
        cells: dict[str, list[float]] = {}
        for seed, path in of_seeds.items():
            summary = json.loads(path.read_text(encoding="utf-8"))
            unit = summary["transunet"]["unit"]
            for convention in ("transunet", "strict"):
                scores = summary[convention]
                for scored in [*scores["classes"], {"class": "mean", **scores["mean"]}]:
                    lines.append([row, seed, convention, scored["class"], *(scored[s] for s in SCORES), scores["unit"]])
                for score in ("dice", "hd95"):
                    value = scores["mean"][score]
                    cells.setdefault(f"{convention} {score}", []).append(float("nan") if value is None else value)
        shown = [_mean_and_deviation(values, 100 if "dice" in name else 1) for name, values in cells.items()]
        table.append([row, len(of_seeds), *shown])
    with atomic_write(folder / "runs.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["row", "seed", "convention", "class", *SCORES, "unit"], *lines])
    header = ["", "seeds", "Dice [%]", f"HD95 [{unit}]", "strict Dice [%]", "strict HD95"]
    text = (
        f"{markdown(header, table)}\n\n{what}. Means over cases and classes, convention transunet and then strict (mm "
        f"where the files have a spacing); mean and standard deviation over the seeds. {machine()}\n"
    )
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _mean_and_deviation(values: list[float], scale: float) -> str:
    mean = f"{scale * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.2f}"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=PRESETS, help="which rows")
    parser.add_argument("--rows", nargs="+", help="only these of them; default: all")
    parser.add_argument("--dataset", default="acdc", choices=SETS, help="the data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2222], help="each row is trained with each of them")
    parser.add_argument("--split", help="list to test on; default: the test list")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("flags", nargs="*", help="behind --: flags of every training")
    args = parser.parse_args()
    args.split = args.split or DATASETS[args.dataset].splits[-1]
    rows = PRESETS[args.preset]
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        raise RunError(f"--rows {', '.join(sorted(unknown))} is no row of {args.preset}: choose of {', '.join(rows)}")
    taken = {"--seed", "--output_dir", "--resume"} & {flag.split("=")[0] for flag in args.flags}
    if taken:
        raise RunError(f"{', '.join(sorted(taken))} is set for each run: leave it out, or use --seeds and --output_dir")
    for seed in args.seeds:  # a first seed of every row before the second of any
        for row in args.rows or rows:
            train_and_test(*run_of(row, seed, args), args)
            text = collect(args.output_dir, tested(args), f"{args.dataset}, {args.split}")
    print(text)


if __name__ == "__main__":
    run_script(main)
