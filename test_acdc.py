"""Test a checkpoint on ACDC volumes: Dice, HD95, Jaccard and ASSD per class, under both conventions.

    python test_acdc.py --checkpoint runs/acdc/best.pth
    python test_acdc.py --checkpoint runs/acdc/best.pth --is_savenii --overlays 3 --test_save_dir results
A checkpoint of the authors' release is taken as it is:
    python test_acdc.py --checkpoint pretrained_pth/release_acdc.pth
"""

from pathlib import Path

from datasets import DataError, VolumeDataset, acdc
from networks import NetworkError, SimMPNet, load_release_state_dict
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    parser = testing_parser(__doc__, volume_path="data/ACDC/test_vol_h5", list_dir="lists/lists_ACDC")
    args = parser.parse_args()

    def open_volumes(num_classes: int) -> VolumeDataset:
        if not Path(args.volume_path).is_dir():
            raise DataError(f"{args.volume_path}: no such folder; {acdc.HOW_TO_GET}")
        return VolumeDataset(args.volume_path, args.list_dir, args.split, num_classes)

    test(args, acdc.CLASS_NAMES, open_volumes, SimMPNet, load_release_state_dict)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
