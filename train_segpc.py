"""Train Sim-MPNet on SegPC-2021, plasma cells under the microscope with cytoplasm and nucleus.

The paper's settings, whole images, on one GPU:
    python train_segpc.py
Single cells (prepare_data.py segpc --raw DIR --crops):
    python train_segpc.py --root_path data/SegPC_crops --output_dir runs/segpc_crops
With the colour augmentation of this field, which the paper has not:
    python train_segpc.py --photometric
A network to compare with, or an ablation (docs/baselines.md):
    python train_segpc.py --network unet --output_dir runs/segpc_unet
    python train_segpc.py --attention plain --output_dir runs/segpc_plain
Go on after an interruption, or start:
    python train_segpc.py --resume auto
On the four GPUs of a machine, batches of 4 x 5:
    torchrun --standalone --nproc_per_node 4 train_segpc.py --batch_size 5
"""

from pathlib import Path

from datasets import DataError, segpc
from datasets.image_sets import training_images
from networks import NETWORKS, NetworkError, default_weights
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "val"), "test": ("train", "test")}
"""For each --select the lists to train on and to choose the best epoch on."""


def main() -> None:
    info = segpc.INFO
    parser = training_parser(__doc__, NETWORKS, info, output_dir="runs/segpc", feature_dim=256, in_channels=3)
    args, checkpoint = parse_training(parser, NETWORKS, SPLITS)
    train_set, val_set = training_images(info, args)
    quick_check(train_set, val_set, info, Path(args.list_dir, "test.txt"))
    train(args, checkpoint, info, train_set, val_set, NETWORKS, default_weights)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
