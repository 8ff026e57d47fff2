"""Test a checkpoint on ISIC-2018: Dice, HD95, Jaccard and ASSD per image, and the scores over all pixels.

python test_isic.py    # the best checkpoint of train_isic.py
python test_isic.py --checkpoint runs/isic/best.pth --split val --save_masks --overlays 1
"""

from datasets import DataError, ImageFolder, isic
from networks import NetworkError
from utils.arguments import testing_parser
from utils.cli import run_script
from utils.launch import test


def main() -> None:
    info = isic.INFO
    args = testing_parser(__doc__, info).parse_args()

    def open_images(num_classes: int) -> ImageFolder:
        return ImageFolder(info, args.root_path, args.list_dir, args.split, num_classes)

    test(args, info, open_images)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
