"""Test a checkpoint on ACDC volumes: Dice, HD95, Jaccard and ASSD per class, under both conventions.

    python test_acdc.py    # the best checkpoint of train_acdc.py
    python test_acdc.py --checkpoint runs/acdc/best.pth --is_savenii --overlays 3 --test_save_dir results
A checkpoint of the authors' release:
    python test_acdc.py --checkpoint pretrained_pth/release_acdc.pth
"""

from datasets import acdc
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    test(testing_parser(__doc__, acdc.INFO), acdc.INFO)


if __name__ == "__main__":
    run_script(main)
