"""Train Sim-MPNet on Synapse, abdominal CT with eight organs.

python train_synapse.py    # the paper's settings; two training cases choose the best epoch
python train_synapse.py --select test --select_from_epoch 100    # the test volumes choose it, as in many papers
python train_synapse.py --label_order transunet    # TransUNet's ready-made files
python train_synapse.py --network unet --output_dir runs/synapse_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_synapse.py --batch_size 5 --resume auto
"""

from datasets import synapse
from utils.arguments import training_parser
from utils.cli import run_script
from utils.launch import train


def main() -> None:
    parser = training_parser(__doc__, synapse.INFO, feature_dim=256)
    parser.add_argument("--val_cases", nargs="+", default=synapse.VALIDATION_CASES, help="held out for --select val")
    train(parser, synapse.INFO)


if __name__ == "__main__":
    run_script(main)
