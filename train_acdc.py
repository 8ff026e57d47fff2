"""Train Sim-MPNet on ACDC, cardiac MR with right ventricle, myocardium and left ventricle.

python train_acdc.py    # the paper's settings, on one GPU
python train_acdc.py --resume auto    # continue a run, or start one
python train_acdc.py --network unet --output_dir runs/acdc_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_acdc.py --batch_size 5
python train_acdc.py --model_scale pico --img_size 128 --img_size_dmwla 96 --pretrained none    # small, on a CPU
"""

from datasets import DataError, SliceDataset, VolumeDataset, acdc
from networks import NetworkError
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "val"), "test": ("trainval", "test")}  # --select: lists to train and select on


def main() -> None:
    info = acdc.INFO
    parser = training_parser(__doc__, info, feature_dim=128)
    args, checkpoint = parse_training(parser, info, SPLITS)
    info.require(args.root_path, args.volume_path)
    train_set = SliceDataset(
        args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size, augment=True, seed=args.seed,
    )  # fmt: skip
    val_set = VolumeDataset(args.volume_path, args.list_dir, args.val_split, args.num_classes)
    info = quick_check(train_set, val_set, info, args)
    train(args, checkpoint, info, train_set, val_set)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
