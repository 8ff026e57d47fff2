"""Train Sim-MPNet on data of your own, which prepare_data.py custom has prepared.

python train_custom.py --data data/Task04_Hippocampus    # the first fold, on one GPU
python train_custom.py --data data/Task04_Hippocampus --fold all    # every fold, new or resumed, one after the other
python train_custom.py --data data/Task04_Hippocampus --network unet --output_dir runs/hippocampus_unet
"""

from utils.arguments import own_data, training_parser
from utils.cli import run_script
from utils.launch import train


def main() -> None:
    for info, argv in own_data("--resume", "auto"):
        train(training_parser(__doc__, info), info, argv)


if __name__ == "__main__":
    run_script(main)
