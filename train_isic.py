"""Train Sim-MPNet on ISIC-2018 task 1, photographs of skin lesions.

python train_isic.py    # the paper's settings, on one GPU
python train_isic.py --photometric    # with colour augmentation, unlike the paper
python train_isic.py --resume auto    # continue a run, or start one
python train_isic.py --network unet --output_dir runs/isic_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_isic.py --batch_size 5
"""

from datasets import isic
from utils.arguments import training_parser
from utils.cli import run_script
from utils.launch import train


def main() -> None:
    train(training_parser(__doc__, isic.INFO, feature_dim=256), isic.INFO)


if __name__ == "__main__":
    run_script(main)
