"""Segment scans of one's own with a trained checkpoint.

One NIfTI file, the folder of a DICOM series, or a folder of NIfTI files:
    python predict.py --checkpoint runs/synapse/best.pth --input scan.nii.gz --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input dicom_folder --output seg.nii.gz
    python predict.py --checkpoint runs/synapse/best.pth --input scans --output segmentations --overlays 3
In a notebook:
    from predict import Predictor
    predictor = Predictor("runs/synapse/best.pth")
    segmentation = predictor("scan.nii.gz")    # a nibabel image on the scan's grid

A segmentation has the scan's affine, spacing, orientation and, where that is one of integers, number type. Beside it
lie the colours and names of its labels (for 3D Slicer, for ITK-SNAP) and the volume of each organ in millilitres.
Memory: the scan as it is stored, its class indices twice, and one batch of slices.
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np

from datasets import DATASETS, DataError, Preprocessing, Volume, read_scan
from datasets.scan import NIFTI_ENDINGS, scan_name
from networks import NetworkError, SimMPNet, load_release_state_dict
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import ArgumentParser, pick_device, run_script, seed_everything, setup_logging
from utils.errors import RunError
from utils.evaluation import predict_volume
from utils.figures import save_overlays
from utils.files import atomic_write, file_stem
from utils.reports import organ_volumes, write_colour_tables, write_volumes_csv
from utils.training import AMP_DTYPES

logger = logging.getLogger("predict")


class Predictor:
    """A trained network with the preprocessing that its checkpoint names.

    checkpoint: best.pth of a run, or one of the release with ``dataset``, the name of the data set it was trained on;
    device: auto, cpu, cuda or cuda:1; amp: none, bf16 or fp16; batch_size: slices predicted at a time. ``class_names``
    are those of label ids 1, 2, ... Raises RunError, DataError or NetworkError for a checkpoint that is unfit.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str = "auto",
        amp: str = "none",
        batch_size: int = 20,
        dataset: str | None = None,
    ):
        state = load_checkpoint(checkpoint)
        data = state.get("data", {})
        facts = DATASETS.get(dataset or data.get("dataset"))
        if "preprocessing" in data:
            self.preprocessing = Preprocessing.from_dict(data["preprocessing"])
        elif facts is not None:
            self.preprocessing = facts.preprocessing
        else:
            raise RunError(f"{checkpoint} does not say how scans are prepared for it: give --dataset")
        self.model = build_network(state, checkpoint, SimMPNet, load_release_state_dict).to(pick_device(device))
        self.device, self.amp_dtype, self.batch_size = pick_device(device), AMP_DTYPES[amp], batch_size
        self.class_names = tuple(data["class_names"] if data else facts.names_for(self.model.config["num_classes"]))

    def read(self, path: str | Path) -> Volume:
        """Open a scan, a NIfTI file or the folder of a DICOM series, as the network is to see it."""
        volume = read_scan(path, self.preprocessing)
        volume.class_names = self.class_names
        return volume

    def segment(self, volume: Volume) -> np.ndarray:
        """Return the class of every voxel of a scan that was read, uint8 (D, H, W)."""
        size = self.model.config["img_size"]
        return predict_volume(self.model, volume, size, self.batch_size, self.device, self.amp_dtype)

    def __call__(self, path: str | Path):
        """Segment a scan: returns a nibabel image that lies where the scan does."""
        volume = self.read(path)
        return volume.to_nifti(self.segment(volume))


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    parser.add_argument("--input", type=Path, required=True, help="NIfTI file, DICOM series folder or NIfTI folder")
    parser.add_argument(
        "--output", type=Path, required=True, help="file (.nii.gz) for one scan, folder for a folder of scans"
    )
    parser.add_argument("--overlays", type=int, default=0, help="PNGs per scan, spread over what was found")
    parser.add_argument("--dataset", choices=DATASETS, help="what a checkpoint of the release was trained on")
    parser.add_argument("--batch_size", type=int, default=20, help="slices predicted at a time")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    parser.add_argument("--amp", default="none", choices=AMP_DTYPES, help="autocast precision")
    args = parser.parse_args()
    if args.batch_size < 1 or args.overlays < 0:
        raise RunError(f"--batch_size {args.batch_size} --overlays {args.overlays}; expected at least 1 and 0")
    return args


def find_scans(source: Path, target: Path) -> tuple[dict[Path, Path], str]:
    """Return the scans with the file that each is segmented to, and the start of the names of what goes beside."""
    inside = sorted(p for p in source.iterdir() if p.name.endswith(NIFTI_ENDINGS)) if source.is_dir() else []
    if inside:
        if target.name.endswith(NIFTI_ENDINGS):
            raise RunError(f"--output {target} is one file, --input {source} holds {len(inside)}: give a folder")
        if target.resolve() == source.resolve():
            raise RunError(f"--output {target} is the folder of the scans, which would be lost: give another")
        twice = [p for p in inside if sum(scan_name(q) == scan_name(p) for q in inside) > 1]
        if twice:
            raise RunError(f"{twice[0]} and {twice[1].name} would be segmented to one file: rename one of them")
        return {path: target / f"{file_stem(scan_name(path))}.nii.gz" for path in inside}, f"{target}/"
    if not target.name.endswith(NIFTI_ENDINGS):
        return {source: target / f"{file_stem(scan_name(source))}.nii.gz"}, f"{target}/"
    if target.resolve() == source.resolve():
        raise RunError(f"--output {target} is the scan, which would be lost: give another name")
    return {source: target}, f"{target.parent / scan_name(target)}_"


def main() -> None:
    import nibabel

    args = parse_args()
    setup_logging()
    seed_everything(0)
    scans, beside = find_scans(args.input, args.output)
    predictor = Predictor(args.checkpoint, args.device, args.amp, args.batch_size, args.dataset)
    rows, failed = [], 0
    for number, (source, target) in enumerate(scans.items(), 1):
        try:
            volume = predictor.read(source)
        except DataError as error:
            if len(scans) == 1:
                raise
            logger.error("%s", error)
            failed += 1
            continue
        prediction = predictor.segment(volume)
        with atomic_write(target) as temporary:
            nibabel.save(volume.to_nifti(prediction), temporary)
        rows += organ_volumes(volume.name, prediction, predictor.class_names, volume.affine)
        if args.overlays:
            save_overlays(f"{beside}overlays", volume, prediction, args.overlays)
        found = len(np.unique(prediction[prediction > 0]))
        logger.info("%d/%d %s: %d of %d classes found", number, len(scans), target, found, len(predictor.class_names))
    write_colour_tables(beside, predictor.class_names)
    write_volumes_csv(f"{beside}volumes.csv", rows)
    logger.info("labels, colours and volumes in %s*", beside)
    if failed:
        raise RunError(f"{failed} of {len(scans)} scans could not be read (above); the others are segmented")


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
