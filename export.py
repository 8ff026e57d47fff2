"""Write a trained network, its memory frozen, as one file that runs without this repository.

    python export.py --checkpoint runs/acdc/best.pth --format onnx --output model.onnx    # for onnxruntime
    python export.py --checkpoint runs/acdc/best.pth --format torch --output model.pt2    # for torch.export.load
    python predict.py --checkpoint model.onnx --input scan.nii.gz --output seg.nii.gz

The program takes images (B, C, S, S), float32, of any B, and gives the sum of the logit maps, (B, num_classes, S, S),
whose argmax is the prediction. The file says how an image is prepared and what each class is. Before it appears it
is run on random images at two batch sizes and compared with PyTorch. docs/export.md has more.
"""

import hashlib
import logging
from argparse import Namespace
from pathlib import Path

from datasets import DATASETS, DataError
from datasets.files import atomic_write, check_writable
from networks import NetworkError
from utils.cli import ArgumentParser, run_script, seed_everything
from utils.errors import RunError
from utils.exported import (
    ENDINGS,
    SummedLogits,
    compare,
    describe,
    devices_here,
    is_export,
    open_export,
    require,
    trace,
    write_export,
)
from utils.predictor import Predictor

logger = logging.getLogger("export")

BATCH_SIZES = (1, 3)  # of the comparison; neither is the traced one


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    parser.add_argument("--format", choices=ENDINGS, required=True, help="onnx, or torch for torch.export")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .onnx or .pt2")
    parser.add_argument("--dataset", choices=DATASETS, help="what a checkpoint of the release was trained on")
    args = parser.parse_args()
    if args.output.suffix != ENDINGS[args.format]:
        raise RunError(f"--output {args.output}: a file of --format {args.format} ends in {ENDINGS[args.format]}")
    if is_export(args.checkpoint):
        raise RunError(f"--checkpoint {args.checkpoint} is an export already: give the best.pth that it was made from")
    return args


def sha256(path: Path) -> str:
    """Return a file's SHA-256, which tells a checkpoint from all others."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    args = parse_args()
    seed_everything(0)
    if args.format == "onnx":  # before anything slow
        require("onnx", "onnxscript", "onnxruntime")
    check_writable(args.output.parent)
    predictor = Predictor(args.checkpoint, "cpu", dataset=args.dataset)
    config, banks = predictor.model.config, list(predictor.model.memory_banks())
    if any(bank.in_warmup for bank in banks):
        logger.warning("%s is still in the memory's warm-up: the export, like it, reads no memory", args.checkpoint)
    if banks and config.get("variant") == "release":
        logger.warning(
            "variant release writes its memory in evaluation; the export does not, so its predictions are not exactly "
            "those of the authors' program (the place in a batch still matters to them)"
        )
    network = SummedLogits(predictor.model)
    metadata = describe(
        predictor.model,
        predictor.dataset,
        predictor.class_names,
        predictor.preprocessing.to_dict(),
        predictor.preprocessing.described(config["img_size"]),
        {"file": args.checkpoint.name, "sha256": sha256(args.checkpoint), **predictor.origin},
    )
    logger.info("tracing %s, which takes up to some minutes for the paper's network", args.checkpoint)
    program = trace(network)
    with atomic_write(args.output) as temporary:
        write_export(temporary, program, metadata)
        for device in devices_here(temporary):
            exported = open_export(temporary, device)
            for batch_size in BATCH_SIZES:
                found = compare(network, exported, batch_size)
                logger.info(
                    "%s, batch of %d: largest difference from PyTorch %.1e, of logits up to %.3g; %.3f %% of the "
                    "pixels get another class",
                    device, batch_size, found.difference, found.scale, 100 * found.other_class,
                )  # fmt: skip
                if not found.good:
                    raise RunError(
                        f"{args.output} was not written: on {device} its logits differ from PyTorch's by "
                        f"{found.difference:.1e}, more than 1e-4 of the largest ({found.scale:.3g}): try the versions "
                        "of constraints.txt"
                    )
    logger.info("%s, %.1f MiB", args.output, args.output.stat().st_size / 2**20)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
