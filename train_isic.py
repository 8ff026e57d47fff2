"""Train Sim-MPNet on ISIC-2018 task 1, photographs of skin lesions.

The paper's settings, on one GPU:
    python train_isic.py
With the colour augmentation of this field, which the paper has not:
    python train_isic.py --photometric
Go on after an interruption:
    python train_isic.py --resume runs/isic/last.pth
"""

from pathlib import Path

from datasets import DataError, ImageDataset, ImageFolder, isic
from datasets.verify import quick_check
from networks import NetworkError, SimMPNet, pretrained_file
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.training import DataFacts

SPLITS = {"val": ("train", "val"), "test": ("train", "test")}
"""For each --select the lists to train on and to choose the best epoch on."""


def main() -> None:
    info = isic.INFO
    parser = training_parser(__doc__, SimMPNet, info, output_dir="runs/isic", feature_dim=256, in_channels=3)
    args, checkpoint = parse_training(parser, SimMPNet, SPLITS)
    info.require(args.root_path)
    names = info.names_for(args.num_classes)

    train_set = ImageDataset(
        args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size, augment=True,
        photometric=args.photometric, seed=args.seed, preprocessing=info.preprocessing,
    )  # fmt: skip
    val_set = ImageFolder(args.root_path, args.list_dir, args.val_split, args.num_classes, names, info.preprocessing)
    selected_on = "test" if args.val_split == "test" else "val"
    quick_check(train_set, val_set, info, Path(args.list_dir, "test.txt") if selected_on == "val" else None)

    facts = DataFacts("isic", names, info.preprocessing.to_dict(), selected_on)
    train(args, checkpoint, facts, train_set, val_set, SimMPNet, pretrained_file)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
