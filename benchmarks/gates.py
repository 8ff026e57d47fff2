"""Train a few hundred steps on ACDC from several seeds, and report the loss and what every gate lets through.

    python -m benchmarks.gates --seeds 1 2 3 --output_dir runs/gates -- --model_scale pico --pretrained none \\
        --img_size 128 --img_size_dmwla 96 --batch_size 12 --base_lr 1e-3 --lr_schedule cosine --max_epochs 4

The flags after ``--`` are those of train_acdc.py. The command writes ``seed_<seed>.csv``, with one row per step. For
each seed it prints the loss per combination of maps (mean of eight steps), and the lowest and highest mean of each kind
of gate. A seed whose file exists is not trained again.
"""

import tempfile
from itertools import islice
from pathlib import Path

import pandas as pd

from benchmarks.measure import machine, write_flags
from datasets import acdc
from utils.arguments import parse_training, training_parser
from utils.cli import ArgumentParser, pick_device, run_script
from utils.errors import RunError
from utils.launch import make_trainer
from utils.results import markdown

KINDS = {  # each kind of gate, and a pattern of its columns
    "between the encoders": "^gate$",
    "spatial": "^gate_spatial",
    "channel": "^gate_channel",
    "injections": "^gate_(maxvit|dmwla)",
}


def train(flags: list[str], steps: int) -> pd.DataFrame:
    """Train at most ``steps`` steps. Return the loss per combination and mean of each gate, one row per step."""
    parser = training_parser(__doc__, acdc.INFO, feature_dim=128)
    parser.prog = "train_acdc.py"  # the --help of this script lists the flags
    args, checkpoint = parse_training(parser, acdc.INFO, flags)
    if args.network != "sim_mpnet":
        raise RunError(f"--network {args.network} has no gates: leave it out")
    trainer, rows = make_trainer(args, checkpoint, acdc.INFO, pick_device(args.device)), []
    model = trainer.model.train()
    for epoch in range(1, args.max_epochs + 1):
        trainer.train_set.set_epoch(epoch)
        trainer.batches.start(epoch)
        for batch in islice(trainer.loader, steps - len(rows)):
            with model.gates_observed() as gates:
                loss = trainer.train_step(batch)[0].item() / (2 ** len(model.heads) - 1)
            passed = {name: maps[0].mean().item() for name, maps in gates.items()}
            rows.append({"step": len(rows) + 1, "loss": loss, **passed})
        if len(rows) == steps:
            break
    return pd.DataFrame(rows)


def summary(seed: int, run: pd.DataFrame, at: list[int]) -> dict[str, object]:
    """Return the row of a seed: the loss at the steps ``at``, and the lowest and highest mean of each kind of gate."""
    losses = run.set_index("step")["loss"].rolling(8, min_periods=1).mean()
    row = {"seed": seed} | {f"loss at {step}": f"{losses[step]:.3f}" for step in at if step in losses.index}
    for kind, pattern in KINDS.items():
        gates = run.filter(regex=pattern)
        row[kind] = "" if gates.empty else f"{gates.min().min():.2f} to {gates.max().max():.2f}"
    return row


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[2222], help="seeds to train from")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each seed")
    parser.add_argument("--report", nargs="+", type=int, default=[20, 60, 120, 200], help="steps whose loss is printed")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument("flags", nargs="*", help="after --: flags of train_acdc.py")
    args = parser.parse_args()
    flags = ["--steps", str(args.steps), "--", *args.flags]
    write_flags(args.output_dir / "flags.txt", flags, used=any(args.output_dir.glob("seed_*.csv")))
    rows = []
    for seed in args.seeds:
        path = args.output_dir / f"seed_{seed}.csv"
        if not path.exists():
            with tempfile.TemporaryDirectory() as unused:
                own = ["--seed", str(seed), "--num_workers", "0", "--output_dir", unused]
                trained = train([*args.flags, *own], args.steps)
            trained.to_csv(path, index=False)
        rows.append(summary(seed, pd.read_csv(path), args.report))
        print(markdown(pd.DataFrame(rows)), flush=True)
    print(machine())


if __name__ == "__main__":
    run_script(main)
