"""Segment scans or photographs of one's own with a trained checkpoint.

One NIfTI file, the folder of a DICOM series, or a folder of NIfTI files:
    python predict.py --checkpoint runs/synapse/best.pth --input scan.nii.gz --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input dicom_folder --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input scans --output segmentations --overlays 3
An image (JPG, PNG, BMP, TIFF) or a folder of them, with a checkpoint of a colour data set:
    python predict.py --checkpoint runs/isic/best.pth --input photo.jpg --output mask.png --overlays 1
With an export of either format (export.py) in the checkpoint's place:
    python predict.py --checkpoint model.onnx --input scan.nii.gz --output seg.nii.gz
In a notebook:
    from utils.predictor import Predictor
    predictor = Predictor("runs/synapse/best.pth")
    segmentation = predictor("scan.nii.gz")    # a nibabel image on the scan's grid; of a photograph, an array (H, W)

A segmentation has the scan's affine, spacing, orientation and, where that is one of integers, number type. Beside it
lie the colours and names of its labels (for 3D Slicer, for ITK-SNAP) and the volume of each organ in millilitres. Of an
image it is a PNG of its size whose grey values are class indices, and beside it lies the area of each class.
Memory: the scan as it is stored (a DICOM series twice while it is read), its class indices twice, and one batch of
slices.
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np

from datasets import DATASETS, DataError, Picture, Volume
from datasets.files import atomic_write, check_writable, file_stem
from datasets.images import ENDINGS as IMAGE_ENDINGS
from datasets.scan import NIFTI_ENDINGS, scan_name
from networks import NetworkError
from utils.cli import AMP_DTYPES, ArgumentParser, run_script, seed_everything
from utils.errors import RunError
from utils.evaluation import save_mask
from utils.figures import save_overlays, save_picture_overlay
from utils.predictor import Predictor, organ_volumes, picture_areas, write_colour_tables, write_report

logger = logging.getLogger("predict")

OTHER_ENDINGS = (*NIFTI_ENDINGS, *IMAGE_ENDINGS, ".gz", ".mha", ".mhd", ".nrrd", ".dcm", ".gif", ".webp")
"""Endings that nobody gives to a folder."""


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth, one of the release, or an export")
    parser.add_argument("--input", type=Path, required=True, help="scan or image, or a folder of them")
    parser.add_argument(
        "--output", type=Path, required=True, help="file (.nii.gz, .png) for one of them, folder for a folder"
    )
    parser.add_argument(
        "--overlays", type=int, default=0, help="PNGs per scan, spread over what was found; of an image at most one"
    )
    parser.add_argument("--dataset", choices=DATASETS, help="what a checkpoint of the release was trained on")
    parser.add_argument("--batch_size", type=int, default=20, help="slices predicted at a time")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    parser.add_argument("--amp", default="none", choices=AMP_DTYPES, help="autocast precision")
    args = parser.parse_args()
    if args.batch_size < 1 or args.overlays < 0:
        raise RunError(f"--batch_size {args.batch_size} --overlays {args.overlays}; expected at least 1 and 0")
    return args


def find_inputs(source: Path, target: Path, planar: bool) -> tuple[dict[Path, Path], str]:
    """Return the scans or images with the file that each is segmented to, and the start of what lies beside them."""
    endings, written = (IMAGE_ENDINGS, (".png",)) if planar else (NIFTI_ENDINGS, NIFTI_ENDINGS)
    stem = (lambda path: path.stem) if planar else scan_name
    inside = []
    if source.is_dir():
        inside = sorted(p for p in source.iterdir() if p.name.lower().endswith(endings) and p.name[0] != ".")
        if planar and not inside:
            raise RunError(f"--input {source} holds no image ({', '.join(endings)})")
    if source.name.lower().endswith(NIFTI_ENDINGS if planar else IMAGE_ENDINGS):
        kinds = ("photographs", "a scan") if planar else ("scans", "a photograph")
        raise RunError(
            f"--input {source} is {kinds[1]}, the checkpoint is for {kinds[0]}: give the other kind of either"
        )
    is_file = target.name.lower().endswith(written)
    if is_file and inside:
        raise RunError(f"--output {target} is one file, --input {source} holds {len(inside)}: give a folder")
    if not is_file and target.suffix.lower() in OTHER_ENDINGS and not target.is_dir():
        raise RunError(f"--output {target}: {' or '.join(written)} is what is written; end it so, or name a folder")
    if is_file:
        outputs, beside = {source: target}, f"{target.parent / stem(target)}_"
    else:
        outputs = {p: target / f"{file_stem(stem(p))}{written[0]}" for p in inside or [source]}
        beside = f"{target}/"
    inputs = {path.resolve() for path in outputs}
    taken: dict[Path, Path] = {}
    for path, output in outputs.items():
        if output.resolve() in inputs:
            raise RunError(f"--output {target}: {output} is an input, which would be lost; give another name or folder")
        if taken.setdefault(output, path) != path:
            raise RunError(f"{taken[output]} and {path.name} would both be segmented to {output}: rename one of them")
    return outputs, beside


def save_scan(target: Path, volume: Volume, prediction: np.ndarray, overlays: int, beside: str) -> list:
    """Write a scan's segmentation and overlays; returns its rows of the report."""
    import nibabel

    with atomic_write(target) as temporary:
        nibabel.save(volume.to_nifti(prediction), temporary)
    if overlays:
        save_overlays(f"{beside}overlays", volume, prediction, overlays)
    return organ_volumes(volume.name, prediction, volume.class_names, volume.affine)


def save_picture(target: Path, picture: Picture, prediction: np.ndarray, overlays: int, beside: str) -> list:
    """Write an image's mask and, if asked for, the image with it; returns its rows of the report."""
    save_mask(target, prediction[0])
    if overlays:
        save_picture_overlay(f"{beside}overlays/{target.stem}.png", picture.image[0], prediction[0])
    return picture_areas(picture.name, prediction[0], picture.class_names)


def main() -> None:
    args = parse_args()
    seed_everything(0)
    predictor = Predictor(args.checkpoint, args.device, args.amp, args.batch_size, args.dataset)
    inputs, beside = find_inputs(args.input, args.output, predictor.planar)
    for folder in {target.parent for target in inputs.values()}:
        check_writable(folder)
    names, rows, failed = predictor.class_names, [], 0
    for number, (source, target) in enumerate(inputs.items(), 1):
        try:
            volume = predictor.read(source)
        except DataError as error:
            if len(inputs) == 1:
                raise
            logger.error("%s", error)
            failed += 1
            continue
        prediction = predictor.segment(volume)
        save = save_picture if predictor.planar else save_scan
        new = save(target, volume, prediction, args.overlays, beside)
        rows += new
        found = sum(count > 0 for _, _, count, _ in new)
        logger.info("%d/%d %s: %d of %d classes found", number, len(inputs), target, found, len(names))
    if predictor.planar:
        write_report(f"{beside}areas.csv", ("image", "class", "pixels", "share"), rows)
    else:
        write_colour_tables(beside, names)
        write_report(f"{beside}volumes.csv", ("scan", "class", "voxels", "millilitres"), rows)
    logger.info("what goes with the segmentations is in %s*", beside)
    if failed:
        raise RunError(f"{failed} of {len(inputs)} could not be read (above); the others are segmented")


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
