"""Test a checkpoint on ACDC volumes: Dice, HD95, Jaccard and ASSD per class, under both conventions.

    python test_acdc.py    # the best checkpoint of train_acdc.py
    python test_acdc.py --checkpoint runs/acdc/best.pth --is_savenii --overlays 3 --test_save_dir results
A checkpoint of the authors' release:
    python test_acdc.py --checkpoint pretrained_pth/release_acdc.pth
"""

from datasets import DataError, VolumeDataset, acdc
from networks import NetworkError
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    info = acdc.INFO
    args = testing_parser(__doc__, info).parse_args()

    def open_volumes(num_classes: int) -> VolumeDataset:
        info.require(args.volume_path)
        return VolumeDataset(args.volume_path, args.list_dir, args.split, num_classes, only=args.cases)

    test(args, info, open_volumes)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
