"""Train Sim-MPNet on ACDC, cardiac MR with right ventricle, myocardium and left ventricle.

python train_acdc.py    # the paper's settings, on one GPU
python train_acdc.py --resume auto    # continue a run, or start one
python train_acdc.py --network unet --output_dir runs/acdc_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_acdc.py --batch_size 5
docs/training.md shows a small network for a CPU.
"""

from datasets import acdc
from utils.arguments import training_parser
from utils.cli import run_script
from utils.launch import train


def main() -> None:
    train(training_parser(__doc__, acdc.INFO, feature_dim=128), acdc.INFO)


if __name__ == "__main__":
    run_script(main)
