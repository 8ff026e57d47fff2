"""Train Sim-MPNet on ACDC, cardiac MR with right ventricle, myocardium and left ventricle.

The paper's settings, on one GPU:
    python train_acdc.py
Another size, schedule or precision:
    python train_acdc.py --img_size 224 --lr_schedule cosine --amp bf16 --output_dir runs/acdc_224
Go on after an interruption:
    python train_acdc.py --resume runs/acdc/last.pth
Small, from scratch, on a CPU:
    python train_acdc.py --model_scale pico --img_size 128 --img_size_dmwla 96 --pretrained none
"""

from datasets import DataError, SliceDataset, VolumeDataset, acdc
from datasets.verify import quick_check
from networks import NetworkError, SimMPNet, pretrained_file
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import class_names_of, train
from utils.training import DataFacts


def main() -> None:
    parser = training_parser(
        __doc__,
        SimMPNet,
        root_path="data/ACDC/train_npz",
        volume_path="data/ACDC/test_vol_h5",
        list_dir="lists/lists_ACDC",
        output_dir="runs/acdc",
        num_classes=4,
        feature_dim=128,
    )
    args, checkpoint = parse_training(parser, SimMPNet)
    splits = {"train": args.train_split, "val": args.val_split}
    quick_check(args.root_path, args.volume_path, args.list_dir, splits, args.num_classes, acdc.HOW_TO_GET)
    train_set = SliceDataset(
        args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size, augment=True, seed=args.seed
    )
    val_set = VolumeDataset(args.volume_path, args.list_dir, args.val_split, args.num_classes)
    facts = DataFacts("acdc", class_names_of(acdc.CLASS_NAMES, args.num_classes))
    train(args, checkpoint, facts, train_set, val_set, SimMPNet, pretrained_file)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
