"""Train Sim-MPNet on Synapse, abdominal CT with eight organs.

The paper's settings, on one GPU, two of the 18 training cases held out to choose the best epoch on:
    python train_synapse.py
The habit of the field, the best epoch chosen on the test volumes, as every table of it will say:
    python train_synapse.py --select test --select_from_epoch 100
TransUNet's ready-made files:
    python train_synapse.py --label_order transunet
A network to compare with, or an ablation (docs/baselines.md):
    python train_synapse.py --network unet --output_dir runs/synapse_unet
    python train_synapse.py --attention plain --output_dir runs/synapse_plain
Go on after an interruption, or start:
    python train_synapse.py --resume auto
On the four GPUs of a machine, batches of 4 x 5:
    torchrun --standalone --nproc_per_node 4 train_synapse.py --batch_size 5
"""

from pathlib import Path

from datasets import DataError, SliceDataset, VolumeDataset, synapse
from networks import NETWORKS, NetworkError, default_weights
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "train"), "test": ("train", "test_vol")}
"""For each --select the lists to train on and to choose the best epoch on; in one list, --val_cases part them."""


def main() -> None:
    info = synapse.INFO
    parser = training_parser(__doc__, NETWORKS, info, output_dir="runs/synapse", feature_dim=256)
    parser.add_argument(
        "--val_cases",
        nargs="+",
        default=synapse.validation_cases(),
        help="cases of the training list that validate and do not train, where --select is val",
    )
    args, checkpoint = parse_training(parser, NETWORKS, SPLITS)
    order = info.label_order(args.label_order, args.num_classes)
    info.require(args.root_path)

    held_out = args.val_cases if args.val_split == args.train_split else ()
    train_set = SliceDataset(
        args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size, augment=True, seed=args.seed,
        label_order=order, without=held_out,
    )  # fmt: skip
    if held_out:  # from their slices, since ready-made sets have no volumes of training cases
        val_set = VolumeDataset(args.root_path, args.list_dir, args.val_split, args.num_classes, order, only=held_out)
    else:
        info.require(args.volume_path)
        val_set = VolumeDataset(args.volume_path, args.list_dir, args.val_split, args.num_classes, order)
    quick_check(train_set, val_set, info, Path(args.list_dir, "test_vol.txt"))
    train(args, checkpoint, info, train_set, val_set, NETWORKS, default_weights)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
