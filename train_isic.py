"""Train Sim-MPNet on ISIC-2018 task 1, photographs of skin lesions.

python train_isic.py    # the paper's settings, on one GPU
python train_isic.py --photometric    # with colour augmentation, unlike the paper
python train_isic.py --resume auto    # continue a run, or start one
python train_isic.py --network unet --output_dir runs/isic_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_isic.py --batch_size 5
"""

from datasets import DataError, isic
from datasets.image_sets import training_images
from networks import NetworkError
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "val"), "test": ("train", "test")}  # --select: lists to train and select on


def main() -> None:
    info = isic.INFO
    parser = training_parser(__doc__, info, feature_dim=256)
    args, checkpoint = parse_training(parser, info, SPLITS)
    train_set, val_set = training_images(info, args)
    info = quick_check(train_set, val_set, info, args)
    train(args, checkpoint, info, train_set, val_set)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
