"""Test a checkpoint on SegPC-2021: Dice, HD95, Jaccard and ASSD per image, and the scores over all pixels.

python test_segpc.py    # the best checkpoint of train_segpc.py
python test_segpc.py --checkpoint runs/segpc/best.pth --split val --save_masks --overlays 1
python test_segpc.py --checkpoint runs/segpc_crops/best.pth --root_path data/SegPC_crops
"""

from datasets import segpc
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    test(testing_parser(__doc__, segpc.INFO), segpc.INFO)


if __name__ == "__main__":
    run_script(main)
