"""ISIC-2018 task 1: dermoscopic photographs of 2594 skin lesions with the lesion's outline.

Codella et al., "Skin lesion analysis toward melanoma detection 2018", arXiv 1902.03368; Tschandl et al., "The HAM10000
dataset", Scientific Data 2018. The paper does not publish its division of the 2594 training images; this one is ours.
"""

from functools import partial
from pathlib import Path

from datasets.errors import DataError
from datasets.files import find_folders
from datasets.image_files import IMAGE_PATTERN
from datasets.info import DatasetInfo
from datasets.lists import files_by_name, split_names, write_lists
from datasets.preparation import paired, prepare_images, read_pair, ready_made
from datasets.preprocessing import RGB, ColourPreprocessing

INFO = DatasetInfo(
    name="isic",
    class_names=("lesion",),
    folder="data/ISIC",
    list_dir="data/ISIC/lists",
    preprocessing=ColourPreprocessing(),
    how_to_get=(
        "download training data and ground truth of ISIC 2018's task 1 (https://challenge.isic-archive.com/data/#2018),"
        " unpack both into one folder, then run: python prepare_data.py isic --raw FOLDER"
    ),
    train_script="train_isic.py",
    channels=RGB,
)

IMAGES, TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"  # the challenge's folders
COUNTS = (1815, 259, 520)  # images for training, validation and test


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/images``, ``out/masks`` and ``out/lists``, divided by ``split_names``. Return the images' names.

    raw: a folder with the challenge's two folders (``IMAGES`` with ``<id>.jpg``, ``TRUTH`` with
    ``<id>_segmentation.png``), or with ``images/<id>`` and ``masks/<id>.png``. Images are copied. jobs, overwrite: as
    in ``prepare_images``. Raises DataError for missing or unusable raw data.
    """
    raw = Path(raw)
    INFO.require(raw)
    images = files_by_name(_files_in(raw, IMAGES), f"(.+)(?<!_superpixels){IMAGE_PATTERN}")
    masks = files_by_name(_files_in(raw, TRUTH), f"(.+)_segmentation{IMAGE_PATTERN}")
    cases = paired(images, masks, f"{IMAGES}/*.jpg", f"{TRUTH}/*_segmentation.png") or ready_made(raw)
    if not cases:
        raise DataError(f"{raw}: no images; expected {IMAGES} and {TRUTH}, or images and masks; {INFO.how_to_get}")
    names = prepare_images(partial(read_pair, (0, 255)), cases, raw, out, jobs, overwrite)
    write_lists(Path(out) / "lists", dict(zip(INFO.splits, split_names(names, COUNTS), strict=True)))
    return names


def _files_in(raw: Path, name: str) -> list[Path]:
    return [path for folder in find_folders(raw, name) for path in folder.iterdir()]
