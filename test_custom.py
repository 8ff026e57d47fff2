"""Test a checkpoint on data of your own: Dice, HD95, Jaccard and ASSD per class, under both conventions.

python test_custom.py --data data/Task04_Hippocampus    # the best checkpoint of train_custom.py
python test_custom.py --data data/Task04_Hippocampus --fold all    # every fold; then: python compare.py runs/*
python test_custom.py --data data/Task04_Hippocampus --split val --overlays 3

Without --split, the test cases are used. If the data have no test cases, the validation cases of the fold are used.
"""

from utils.arguments import own_data, testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    for info, argv in own_data():
        test(testing_parser(__doc__, info), info, argv)


if __name__ == "__main__":
    run_script(main)
