"""Test a checkpoint on SegPC-2021: Dice, HD95, Jaccard and ASSD per image, and the scores over all pixels.

python test_segpc.py    # the best checkpoint of train_segpc.py
python test_segpc.py --checkpoint runs/segpc/best.pth --split val --save_masks --overlays 1
python test_segpc.py --checkpoint runs/segpc_crops/best.pth --root_path data/SegPC_crops
"""

from datasets import DataError, ImageFolder, segpc
from networks import NetworkError
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    info = segpc.INFO
    args = testing_parser(__doc__, info).parse_args()

    def open_images(num_classes: int) -> ImageFolder:
        return ImageFolder(info, args.root_path, args.list_dir, args.split, num_classes)

    test(args, info, open_images)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
