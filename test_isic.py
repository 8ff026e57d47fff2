"""Test a checkpoint on ISIC-2018: Dice, HD95, Jaccard and ASSD per image, and the scores over all pixels.

python test_isic.py    # the best checkpoint of train_isic.py
python test_isic.py --checkpoint runs/isic/best.pth --split val --save_masks --overlays 1
"""

from datasets import isic
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    test(testing_parser(__doc__, isic.INFO), isic.INFO)


if __name__ == "__main__":
    run_script(main)
