"""Train and test configurations over several seeds, one table row each: ``python -m benchmarks.ablation``.

Every part of the paper left out in turn, on ACDC; what follows ``--`` goes to every training:
    python -m benchmarks.ablation --preset parts --seeds 2222 1 2 --output_dir runs/parts -- --amp bf16
The networks to compare with, or some of them, on another set:
    python -m benchmarks.ablation --preset networks --rows sim_mpnet unet --dataset isic --output_dir runs/networks
A row does not get the flags that its network does not take.
The same command resumes: it trains what is not finished and tests what is not tested. The folder holds each run with
its results (``<row>/seed_<seed>``) and the means of all (``table.md``).
"""

import json
import logging
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.measure import machine
from datasets import DATASETS
from datasets.files import atomic_write
from networks import FIRST, NETWORKS
from utils.arguments import flags_of_others
from utils.cli import ArgumentParser, run_script
from utils.comparison import compare, read_run
from utils.comparison_report import score_rows, score_tables
from utils.errors import RunError
from utils.results import markdown

ROOT = Path(__file__).resolve().parents[1]
# For each choice of --preset its rows: their name in the table, and the flags of train_<set>.py.
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
    "networks": {name: f"--network {name}" for name in NETWORKS},
}


def fitting(flags: list[str], row: str) -> list[str]:
    """Return those of the flags, each with its values, that the network of a row takes."""
    words, kept, takes = [*flags, *shlex.split(row)], [], True
    network = words[words.index("--network") + 1] if "--network" in words else FIRST
    for word in flags:
        if word.startswith("--"):
            takes = word[2:].split("=")[0] not in flags_of_others().get(network, ())
        if takes:
            kept.append(word)
    return kept


def flags_of(row: str, seed: object, args: Namespace) -> str:
    """Return the flags of a row's training, except its folder."""
    flags = PRESETS[args.preset][row]
    return shlex.join([*fitting(args.flags, flags), *shlex.split(flags), "--seed", str(seed)])


def train_and_test(folder: Path, flags: str, args: Namespace) -> None:
    """Train and test one run from where an earlier call stopped; raises RunError if it was trained with other flags."""
    typed, last = folder / "flags.txt", folder / "last.pth"
    if typed.exists() and (before := typed.read_text(encoding="utf-8")) != flags:
        raise RunError(f"{folder} was trained with {before}, not {flags}: choose another --output_dir")
    if (folder / f"results_{args.split}" / "summary.json").exists():
        return
    with atomic_write(typed) as temporary:
        temporary.write_text(flags, encoding="utf-8")
    new = [*shlex.split(flags), "--output_dir", folder]
    _run(f"train_{args.dataset}.py", *(["--resume", last] if last.exists() else new))
    trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
    data = "volume_path" if "volume_path" in trained else "root_path"
    names = (data, "list_dir", "label_order", "device", "n_gpu", "amp")
    same = [word for name in names if trained.get(name) is not None for word in (f"--{name}", trained[name])]
    _run(f"test_{args.dataset}.py", "--checkpoint", folder / "best.pth", "--split", args.split, *same)


def _run(script: str, *flags: object) -> None:
    logging.info("%s %s", script, shlex.join(map(str, flags)))
    # subprocess.run would kill the script after Ctrl-C, which the script gets too and then saves a checkpoint.
    with subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)]) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if status:
        raise RunError(f"{script} ended with status {status} for the reason above: correct it and repeat the command")


def write_table(args: Namespace) -> str:
    """Write ``table.md`` of all runs with these flags, of earlier calls too; return it."""
    runs = []
    for row in PRESETS[args.preset]:
        for path in sorted(args.output_dir.glob(f"{row.replace(' ', '_')}/seed_*/results_{args.split}/summary.json")):
            folder = path.parents[1]
            if (folder / "flags.txt").read_text(encoding="utf-8") == flags_of(row, folder.name[5:], args):
                runs.append(read_run(folder, method=row))
    text = [f"{args.dataset}, {args.split}. Mean ± standard deviation over seeds (over cases). {machine()}"]
    for comparison in compare(runs, [args.split]):
        for caption, table in score_tables(comparison, score_rows(comparison, {}), tests=()).items():
            text += [caption, markdown(table.drop(columns=["parameters [M]", "multiply-adds [G]"], errors="ignore"))]
    with atomic_write(args.output_dir / "table.md") as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return "\n\n".join(text)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, choices=PRESETS, help="which rows")
    parser.add_argument("--rows", nargs="+", help="only these rows; default: all")
    sets = [name for name, info in DATASETS.items() if info.train_script == f"train_{name}.py"]
    parser.add_argument("--dataset", default="acdc", choices=sets, help="the data set")
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
            train_and_test(args.output_dir / row.replace(" ", "_") / f"seed_{seed}", flags_of(row, seed, args), args)
            table = write_table(args)
    print(table)


if __name__ == "__main__":
    run_script(main)
