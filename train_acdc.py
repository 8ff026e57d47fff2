"""Train Sim-MPNet on ACDC, cardiac MR with right ventricle, myocardium and left ventricle.

The paper's settings, on one GPU:
    python train_acdc.py
Another size, schedule or precision:
    python train_acdc.py --img_size 224 --lr_schedule cosine --amp bf16 --output_dir runs/acdc_224
A network to compare with, or an ablation (docs/baselines.md):
    python train_acdc.py --network unet --output_dir runs/acdc_unet
    python train_acdc.py --attention plain --output_dir runs/acdc_plain
Go on after an interruption, or start:
    python train_acdc.py --resume auto
On the four GPUs of a machine, batches of 4 x 5:
    torchrun --standalone --nproc_per_node 4 train_acdc.py --batch_size 5
Small, from scratch, on a CPU:
    python train_acdc.py --model_scale pico --img_size 128 --img_size_dmwla 96 --pretrained none
"""

from pathlib import Path

from datasets import DataError, SliceDataset, VolumeDataset, acdc
from networks import NETWORKS, NetworkError, default_weights
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "val"), "test": ("trainval", "test")}
"""For each --select the lists to train on and to choose the best epoch on."""


def main() -> None:
    info = acdc.INFO
    parser = training_parser(__doc__, NETWORKS, info, output_dir="runs/acdc", feature_dim=128)
    args, checkpoint = parse_training(parser, NETWORKS, SPLITS)
    info.require(args.root_path, args.volume_path)

    train_set = SliceDataset(
        args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size, augment=True, seed=args.seed,
    )  # fmt: skip
    val_set = VolumeDataset(args.volume_path, args.list_dir, args.val_split, args.num_classes)
    quick_check(train_set, val_set, info, Path(args.list_dir, "test.txt"))
    train(args, checkpoint, info, train_set, val_set, NETWORKS, default_weights)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
