"""Train Sim-MPNet on ISIC-2018 task 1, photographs of skin lesions.

The paper's settings, on one GPU:
    python train_isic.py
With the colour augmentation of this field, which the paper has not:
    python train_isic.py --photometric
A network to compare with, or an ablation (docs/baselines.md):
    python train_isic.py --network unet --output_dir runs/isic_unet
    python train_isic.py --attention plain --output_dir runs/isic_plain
Go on after an interruption, or start:
    python train_isic.py --resume auto
On the four GPUs of a machine, batches of 4 x 5:
    torchrun --standalone --nproc_per_node 4 train_isic.py --batch_size 5
"""

from pathlib import Path

from datasets import DataError, isic
from datasets.image_sets import training_images
from networks import NETWORKS, NetworkError, default_weights
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "val"), "test": ("train", "test")}
"""For each --select the lists to train on and to choose the best epoch on."""


def main() -> None:
    info = isic.INFO
    parser = training_parser(__doc__, NETWORKS, info, output_dir="runs/isic", feature_dim=256, in_channels=3)
    args, checkpoint = parse_training(parser, NETWORKS, SPLITS)
    train_set, val_set = training_images(info, args)
    quick_check(train_set, val_set, info, Path(args.list_dir, "test.txt"))
    train(args, checkpoint, info, train_set, val_set, NETWORKS, default_weights)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
