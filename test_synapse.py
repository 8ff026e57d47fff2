"""Test a checkpoint on Synapse volumes: Dice, HD95, Jaccard and ASSD per organ, under both conventions.

    python test_synapse.py    # the best checkpoint of train_synapse.py
    python test_synapse.py --checkpoint runs/synapse/best.pth --is_savenii --overlays 3 --test_save_dir results
The two cases on which the best epoch was chosen:
    python test_synapse.py --checkpoint runs/synapse/best.pth --split train --cases case0023 case0026
TransUNet's ready-made volumes, and a checkpoint of the authors' release:
    python test_synapse.py --checkpoint pretrained_pth/release_synapse.pth --label_order transunet
"""

from datasets import DataError, VolumeDataset, synapse
from networks import NetworkError
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    info = synapse.INFO
    args = testing_parser(__doc__, info).parse_args()

    def open_volumes(num_classes: int) -> VolumeDataset:
        info.require(args.volume_path)
        order = info.label_order(args.label_order, num_classes)
        return VolumeDataset(args.volume_path, args.list_dir, args.split, num_classes, order, args.cases)

    test(args, info, open_volumes)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
