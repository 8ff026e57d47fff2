"""Train, test and compare configurations over several seeds: ``python -m benchmarks.ablation``.

Leave out each part of the paper in turn, on ACDC; the flags after ``--`` go to every training:
    python -m benchmarks.ablation --preset parts --seeds 2222 1 2 --output_dir runs/parts -- --amp bf16
Train the networks to compare with, or some of them, on another data set:
    python -m benchmarks.ablation --preset networks --rows sim_mpnet unet --dataset isic --output_dir runs/networks
The same command resumes: it continues unfinished trainings and tests runs that are not tested yet. The output folder
holds each run with its results (``<row>/seed_<seed>``) and the output of ``compare.py`` for all runs (``comparison``).
"""

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import write_flags
from datasets import DATASETS
from networks import NETWORKS
from utils.cli import ArgumentParser, run_script
from utils.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
# The rows of each --preset: the name of each row in the table, and its flags of train_<set>.py.
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
    "variants": {v: f"--variant {v} --select val --select_from_epoch 1" for v in ("paper", "stable", "release")},
    # On a GPU swin_upernet has an operation that is not deterministic.
    "networks": {name: f"--network {name}" + " --deterministic 0" * (name == "swin_upernet") for name in NETWORKS},
}


def train_and_test(folder: Path, dataset: str, split: str, flags: list[str]) -> None:
    """Train and test a run from where an earlier call stopped. Raises RunError if it was trained with other flags."""
    last = folder / "last.pth"
    write_flags(folder / "flags.txt", flags, used=last.exists() or any(folder.glob("results_*")))
    if (folder / f"results_{split}" / "summary.json").exists():
        return
    _run(f"train_{dataset}.py", *(["--resume", last] if last.exists() else [*flags, "--output_dir", folder]))
    trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
    same = [word for name in ("device", "n_gpu", "amp") if name in trained for word in (f"--{name}", trained[name])]
    _run(f"test_{dataset}.py", "--checkpoint", folder / "best.pth", "--split", split, *same)


def _run(script: str, *flags: object) -> None:
    logging.info("%s %s", script, shlex.join(map(str, flags)))
    if status := subprocess.run([sys.executable, ROOT / script, *map(str, flags)]).returncode:
        raise RunError(f"{script} ended with status {status} for the reason above: correct it and repeat the command")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=PRESETS, help="group of rows to train")
    parser.add_argument("--rows", nargs="+", help="only these rows; default: all")
    sets = [name for name, info in DATASETS.items() if info.train_script == f"train_{name}.py"]
    parser.add_argument("--dataset", default="acdc", choices=sets, help="the data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2222], help="seeds with which each row is trained")
    parser.add_argument("--split", help="list to test on; default: the test list")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs and the comparison")
    parser.add_argument("flags", nargs="*", help="after --: flags of every training")
    args = parser.parse_args()
    split, rows = args.split or DATASETS[args.dataset].splits[-1], PRESETS[args.preset]
    if unknown := set(args.rows or ()) - set(rows):
        raise RunError(f"--rows {', '.join(sorted(unknown))}: unknown in {args.preset}; choose from {', '.join(rows)}")
    if taken := {"--seed", "--output_dir", "--resume"} & {flag.split("=")[0] for flag in args.flags}:
        raise RunError(f"{', '.join(sorted(taken))} after --: leave it out, or give --seeds or --output_dir before --")
    for seed in args.seeds:  # first one seed of every row, so that an interrupted call has all rows
        for name in args.rows or rows:
            row, folder = shlex.split(rows[name]), args.output_dir / name.replace(" ", "_") / f"seed_{seed}"
            train_and_test(folder, args.dataset, split, [*args.flags, *row, "--seed", str(seed)])
    folders = {name: sorted(args.output_dir.glob(f"{name.replace(' ', '_')}/seed_*")) for name in rows}
    runs = [f"{name}={folder}" for name in rows for folder in folders[name]]  # also of earlier calls
    _run("compare.py", *runs, "--split", split, "--output_dir", args.output_dir / "comparison")


if __name__ == "__main__":
    run_script(main)
