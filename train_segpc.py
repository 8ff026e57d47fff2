"""Train Sim-MPNet on SegPC-2021, plasma cells under the microscope with cytoplasm and nucleus.

python train_segpc.py    # the paper's settings, on one GPU
python train_segpc.py --root_path data/SegPC_crops --output_dir runs/segpc_crops    # single cells, not whole images
python train_segpc.py --photometric    # with colour augmentation, unlike the paper
python train_segpc.py --resume auto    # continue a run, or start one
python train_segpc.py --network unet --output_dir runs/segpc_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_segpc.py --batch_size 5
"""

from datasets import segpc
from utils.arguments import training_parser
from utils.cli import run_script
from utils.launch import train


def main() -> None:
    train(training_parser(__doc__, segpc.INFO, feature_dim=256), segpc.INFO)


if __name__ == "__main__":
    run_script(main)
