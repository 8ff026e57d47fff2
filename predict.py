"""Segment scans or pictures of your own with a trained checkpoint.

A scan, a DICOM series (its folder, one of its files, or a DICOMDIR), or a folder that holds several of them:
    python predict.py --checkpoint runs/synapse/best.pth --input scan.nii.gz --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input dicom_folder --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input scans --output segmentations --overlays 3
An image (JPG, PNG, BMP, TIFF) or a folder of them, with a checkpoint of a colour data set:
    python predict.py --checkpoint runs/isic/best.pth --input photo.jpg --output mask.png --overlays 1
With an ONNX file of export.py instead of the checkpoint:
    python predict.py --checkpoint model.onnx --input scan.nii.gz --output seg.nii.gz

docs/own_scans.md lists the formats, what is written, and what is refused. In a notebook, use utils/predictor.py.
"""

import logging
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets import DATASETS, DataError, scan_files
from datasets.dicom import several_series
from datasets.errors import brief
from datasets.files import atomic_write, check_writable, file_stem
from datasets.image_files import IMAGE_ENDINGS, common_bits, save_png
from datasets.lists import is_one_line
from datasets.scan import write_segmentation
from utils.arguments import add_prediction
from utils.cli import AMP_DTYPES, ArgumentParser, number, run_script, seed_everything
from utils.errors import RunError
from utils.figures import save_overlays, save_picture_overlay
from utils.predictor import Predictor, class_sizes, write_colour_tables
from utils.results import write_csv

SECOND_FILES = (".img", ".img.gz", ".raw", ".raw.gz", ".zraw")  # they hold the voxels of a scan
OTHER_FILES = (".gz", ".gif", ".webp")  # more extensions of an --output that is a file, not a folder

logger = logging.getLogger("predict")


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pth, a checkpoint of the release, or an ONNX file")
    add("--input", type=Path, required=True, help="scan or image, or a folder of them")
    add("--output", type=Path, required=True, help="file (.nii.gz, .nrrd, .mha, .mgz, .png), or a folder")
    add("--time_point", type=int, help="index, from 0, of the volume to segment if a scan has several")
    text = "number of PNGs per scan, of slices that show classes; 1 or more: one per image"
    add("--overlays", type=number(int, 0), default=0, help=text)
    add("--dataset", choices=DATASETS, help="data set that a checkpoint of the release was trained on")
    add_prediction(add)
    add("--batch_size", type=number(int, 1), default=20, help="slices predicted at a time")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    add("--amp", default="none", choices=AMP_DTYPES, help="autocast precision, or TensorFloat-32")
    return parser.parse_args()


def find_inputs(source: Path, planar: bool, channels: int) -> list[Path]:
    """Return the inputs that --input names: the scans, images or DICOM series in a folder, or the one file or series.

    If a scan has one file per channel, only the first of these files is returned.
    """
    endings, other = (IMAGE_ENDINGS, scan_files.SCAN_ENDINGS) if planar else (scan_files.FOLDER_ENDINGS, IMAGE_ENDINGS)
    if source.name.lower().endswith(other):
        found, expected = ("scan", "pictures") if planar else ("picture", "scans")
        raise RunError(
            f"--input {source} is a {found}, but the checkpoint is for {expected}: give another --checkpoint"
        )
    if not source.is_dir():
        return [source]
    inside = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    found = [path for path in inside if path.name.lower().endswith(endings)]
    if planar and not found:
        raise RunError(f"--input {source} contains no image ({', '.join(endings)})")
    if not found:
        return several_series(source) or [source]
    second = {scan_files.scan_name(path) + ending for path in found for ending in SECOND_FILES}
    others = [path.name + "/" * path.is_dir() for path in inside if path not in found and path.name not in second]
    if others:
        logger.warning("left out of %s (give a scan or folder alone as --input): %s", source, brief(", ".join(others)))
    return found if planar else list(dict.fromkeys(scan_files.channel_files(path, channels)[0] for path in found))


def name_outputs(inputs: list[Path], target: Path, planar: bool, channels: int) -> tuple[list[Path], str]:
    """Return the output file of each input, and the path with which all other output files begin."""
    extensions = (".png",) if planar else scan_files.LABEL_ENDINGS
    files = [[path] if planar else scan_files.channel_files(path, channels) for path in inputs]
    names = [file_stem(paths[0].stem if planar else scan_files.case_name(paths)) for paths in files]
    if target.name.lower().endswith(extensions):
        if len(inputs) > 1:
            raise RunError(f"--output {target} is one file, but there are {len(inputs)} inputs: give a folder")
        stem = target.stem if planar else scan_files.scan_name(target)
        outputs, prefix = [target], f"{target.parent / stem}_"
    elif not target.is_dir() and target.suffix.lower() in (*scan_files.SCAN_ENDINGS, *IMAGE_ENDINGS, *OTHER_FILES):
        raise RunError(f"--output {target}: expected a name that ends in {', '.join(extensions)}, or a folder")
    else:
        endings = [".png" if planar else scan_files.label_ending(path) for path in inputs]
        outputs, prefix = [target / (name + ending) for name, ending in zip(names, endings, strict=True)], f"{target}/"
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise RunError(f"--input: {count} inputs would have the same output name {name}: rename all but one")
    for path in inputs:
        if not is_one_line(path.name):
            raise RunError(f"{path.name!r} in {path.parent}: this name cannot be written to a table: rename it")
    originals = {path.resolve() for of_one in files for path in of_one}
    for output in outputs:
        if output.resolve() in originals:
            raise RunError(f"--output {target}: {output} is an input and would be lost: give another name or folder")
    return outputs, prefix


def main() -> None:
    args = parse_args()
    seed_everything(0)
    info = DATASETS.get(args.dataset)
    predictor = Predictor(args.checkpoint, args.device, args.amp, args.batch_size, info, args.prediction)
    planar, channels = predictor.planar, len(predictor.channels)
    inputs = find_inputs(args.input, planar, channels)
    outputs, prefix = name_outputs(inputs, args.output, planar, channels)
    check_writable(outputs[0].parent)
    if planar:
        bits = common_bits(inputs, predictor.preprocessing.bits)
        predictor.preprocessing = replace(predictor.preprocessing, bits=bits)
    endings = (".png",) if planar else scan_files.LABEL_ENDINGS
    former = {path.name for path in args.output.glob("*") if path.name.endswith(endings)} - {o.name for o in outputs}
    if former:
        text = "%s holds other files (%s), which the tables and colours of this call do not describe"
        logger.warning(text, args.output, brief(", ".join(sorted(former)), 60))
    sizes, failed = [], 0
    for i, (source, target) in enumerate(zip(inputs, outputs, strict=True), 1):
        try:
            case = predictor.read(source, args.time_point)
        except DataError as error:
            if len(inputs) == 1:
                raise
            logger.error("%s", error)
            failed += 1
            continue
        prediction = predictor.segment(case)
        if planar:
            save_png(target, prediction[0])
        else:
            with atomic_write(target) as temporary:
                write_segmentation(temporary, case, prediction)
        if args.overlays and planar:
            save_picture_overlay(f"{prefix}overlays/{target.stem}.png", case.image[0], prediction[0])
        elif args.overlays:
            save_overlays(f"{prefix}overlays", case, prediction, args.overlays)
        sizes += class_sizes(case, prediction)
        found = len(np.unique(prediction[prediction > 0]))
        logger.info("%d/%d %s: classes found: %d of %d", i, len(inputs), target, found, len(predictor.class_names))
    if not sizes:
        raise RunError(f"none of the {failed} inputs could be read (see above)")
    write_csv(f"{prefix}{'areas' if planar else 'volumes'}.csv", sizes, "%.6g")
    if not planar:
        write_colour_tables(prefix, predictor.class_names)
    logger.info("tables, and overlays if any, were written to %s*", prefix)
    if failed:
        raise RunError(f"{failed} of {len(inputs)} inputs could not be read (see above); the others are segmented")


if __name__ == "__main__":
    run_script(main)
