"""Train and test configurations over several seeds, one table row each: ``python -m benchmarks.ablation``.

Every part of the paper left out in turn, on ACDC; what follows ``--`` goes to every training:
    python -m benchmarks.ablation --preset parts --seeds 2222 1 2 --output_dir runs/parts -- --amp bf16
The networks to compare with, or some of them, on another set:
    python -m benchmarks.ablation --preset networks --rows sim_mpnet unet --dataset isic --output_dir runs/networks
A row does not get the flags that its network does not take.
The same command resumes: it trains what is not finished and tests what is not tested. The folder holds each run with
its results (``<row>/seed_<seed>``), all scores (``runs.csv``) and their means (``table.md``).
"""

import json
import logging
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.measure import machine
from datasets import DATASETS
from datasets.files import atomic_write
from networks import NETWORKS
from utils.arguments import FIRST, flags_of_others
from utils.cli import ArgumentParser, run_script
from utils.errors import RunError
from utils.results import CONVENTIONS, METRICS, markdown

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
"""For each choice of ``--preset`` its rows: their name in the table, and the flags of ``train_<set>.py``."""
SETS = [name for name, info in DATASETS.items() if info.train_script == f"train_{name}.py"]


def fitting(flags: list[str], row: str) -> list[str]:
    """Return those of the flags, each with its values, that the network of a row takes."""
    words = [*flags, *shlex.split(row)]
    network = words[words.index("--network") + 1] if "--network" in words else FIRST
    foreign, kept, takes = flags_of_others().get(network, ()), [], True
    for word in flags:
        if word.startswith("--"):
            takes = word[2:].split("=")[0] not in foreign
        if takes:
            kept.append(word)
    return kept


def run_of(row: str, seed: object, args: Namespace) -> tuple[Path, list[str]]:
    """Return the folder and the flags of a row's run."""
    flags = PRESETS[args.preset][row]
    folder = args.output_dir / row.replace(" ", "_") / f"seed_{seed}"
    return folder, [*fitting(args.flags, flags), *shlex.split(flags), "--seed", str(seed)]


def train_and_test(folder: Path, flags: list[str], args: Namespace) -> None:
    """Train and test one run from where an earlier call stopped; raises RunError if it was trained with other flags."""
    typed, words = folder / "flags.txt", shlex.join(flags)
    if typed.exists() and (before := typed.read_text(encoding="utf-8")) != words:
        raise RunError(f"{folder} was trained with {before}, not {words}: choose another --output_dir")
    if (folder / f"results_{args.split}" / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    typed.write_text(words, encoding="utf-8")
    last = folder / "last.pth"
    _run(f"train_{args.dataset}.py", *(["--resume", last] if last.exists() else [*flags, "--output_dir", folder]))
    trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
    same = [
        "volume_path" if "volume_path" in trained else "root_path",
        "list_dir",
        "label_order",
        "device",
        "n_gpu",
        "amp",
    ]
    same = [word for name in same if trained.get(name) is not None for word in (f"--{name}", trained[name])]
    _run(f"test_{args.dataset}.py", "--checkpoint", folder / "best.pth", "--split", args.split, *same)


def _run(script: str, *flags: object) -> None:
    logger.info("%s %s", script, shlex.join(map(str, flags)))
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the script got it too, and saves a checkpoint
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise RunError(f"{script} ended with status {status} for the reason above: correct it and repeat the command")


def collect(args: Namespace) -> str:
    """Write ``runs.csv`` and ``table.md`` of all runs with these flags, of earlier calls too; return the table."""
    import pandas as pd

    scores = []
    for row in PRESETS[args.preset]:
        for folder in sorted(run_of(row, "*", args)[0].parent.glob("seed_*"), key=lambda path: int(path.name[5:])):
            seed = int(folder.name[5:])
            typed, path = folder / "flags.txt", folder / f"results_{args.split}" / "summary.json"
            flags = shlex.join(run_of(row, seed, args)[1])
            if not (path.exists() and typed.exists() and typed.read_text(encoding="utf-8") == flags):
                continue
            summary = json.loads(path.read_text(encoding="utf-8"))
            for convention in CONVENTIONS:
                of_classes = [*summary[convention]["classes"], {"class": "mean", **summary[convention]["mean"]}]
                frame = pd.DataFrame(of_classes)[["class", *METRICS]]
                scores.append(frame.assign(row=row, seed=seed, convention=convention, unit=summary[convention]["unit"]))
    runs = pd.concat(scores, ignore_index=True)[["row", "seed", "convention", "class", *METRICS, "unit"]]
    with atomic_write(args.output_dir / "runs.csv") as temporary:
        runs.to_csv(temporary, index=False)

    table = runs.groupby("row", sort=False).agg(seeds=("seed", "nunique"))
    for (convention, unit), means in runs[runs["class"] == "mean"].groupby(["convention", "unit"], sort=False):
        for metric, name, scale in (("dice", "Dice [%]", 100), ("hd95", f"HD95 [{unit}]", 1)):
            of_row = (scale * means.set_index("row")[metric].astype(float)).groupby(level=0).agg(["mean", "std"])
            table[f"{convention} {name}"] = of_row.apply(_mean_and_deviation, axis=1)
    text = (
        f"{markdown(table, index=True)}\n\n{args.dataset}, {args.split}. Means over cases and classes; mean ± standard "
        f"deviation over the seeds. {machine()}\n"
    )
    with atomic_write(args.output_dir / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _mean_and_deviation(row) -> str:
    return f"{row['mean']:.2f}" + ("" if row["std"] != row["std"] else f" ± {row['std']:.2f}")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=PRESETS, help="which rows")
    parser.add_argument("--rows", nargs="+", help="only these rows; default: all")
    parser.add_argument("--dataset", default="acdc", choices=SETS, help="the data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2222], help="seeds with which each row is trained")
    parser.add_argument("--split", help="list to test on; default: the test list")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("flags", nargs="*", help="after --: flags of every training")
    args = parser.parse_args()
    args.split = args.split or DATASETS[args.dataset].splits[-1]
    rows = PRESETS[args.preset]
    if unknown := set(args.rows or ()) - set(rows):
        raise RunError(f"--rows {', '.join(sorted(unknown))}: unknown in {args.preset}, choose of {', '.join(rows)}")
    if taken := {"--seed", "--output_dir", "--resume"} & {flag.split("=")[0] for flag in args.flags}:
        raise RunError(f"{', '.join(sorted(taken))} after --: each run has its own, use --seeds and --output_dir")
    for seed in args.seeds:  # first one seed of every row, so that early tables have all rows
        for row in args.rows or rows:
            train_and_test(*run_of(row, seed, args), args)
            text = collect(args)
    print(text)


if __name__ == "__main__":
    run_script(main)
