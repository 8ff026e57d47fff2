"""Test a checkpoint on data of your own: Dice, HD95, Jaccard and ASSD per class, under both conventions.

python test_custom.py --data data/Task04_Hippocampus    # the best checkpoint of train_custom.py
python test_custom.py --data data/Task04_Hippocampus --fold all    # that of every fold, then: python compare.py runs/*
python test_custom.py --data data/Task04_Hippocampus --split val --overlays 3

Without --split, cases are those of the test part, or without one those that validate the fold.
"""

from utils.arguments import own_data, testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    for info, argv in own_data():
        test(testing_parser(__doc__, info), info, argv)


if __name__ == "__main__":
    run_script(main)
