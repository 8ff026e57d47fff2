"""Test a checkpoint on Synapse volumes: Dice, HD95, Jaccard and ASSD per organ, under both conventions.

    python test_synapse.py    # the best checkpoint of train_synapse.py
    python test_synapse.py --checkpoint runs/synapse/best.pth --is_savenii --overlays 3 --test_save_dir results
The two cases on which the best epoch was chosen:
    python test_synapse.py --checkpoint runs/synapse/best.pth --split train --cases case0023 case0026
With TransUNet's ready-made volumes, and a checkpoint of the authors' release:
    python test_synapse.py --checkpoint pretrained_pth/release_synapse.pth --label_order transunet
"""

from datasets import synapse
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    test(testing_parser(__doc__, synapse.INFO), synapse.INFO)


if __name__ == "__main__":
    run_script(main)
