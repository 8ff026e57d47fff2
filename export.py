"""Write a trained network as one ONNX file that runs without this repository.

    python export.py --checkpoint runs/acdc/best.pth --output model.onnx
    python predict.py --checkpoint model.onnx --input scan.nii.gz --output seg.nii.gz

The network takes images (B, C, S, S), float32, with any B, and returns the sum of its logit maps, float32
(B, num_classes, S, S), whose arg max is the prediction. Its memory is frozen. The file also states how an image is
prepared and what each class is. Before it is written, it is run on random images at two batch sizes and compared with
PyTorch. docs/export.md has more.
"""

import hashlib
import io
import json
import logging
from argparse import Namespace
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import DATASETS
from datasets.errors import brief
from datasets.files import atomic_write, check_writable
from utils.arguments import add_prediction
from utils.cli import ArgumentParser, run_script, seed_everything
from utils.errors import RunError
from utils.onnx_network import INPUT, KEY, OUTPUT, OnnxNetwork, is_onnx, require
from utils.predictor import Predictor

logger = logging.getLogger("export")

TOLERANCE = 1e-4


class SummedLogits(nn.Module):
    """Map images (B, C, S, S) to the sum of a network's logit maps, in evaluation and with a frozen memory."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for bank in network.memory_banks():
            bank.writable = False
        self.config = network.config
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor) -> Tensor:
        return sum(self.network(image))


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pth of a run, or a checkpoint of the authors' release")
    add("--format", choices=("onnx",), default="onnx", help="format of the file")
    add("--output", type=Path, required=True, help="file to write; its name ends in .onnx")
    add("--dataset", choices=DATASETS, help="data set that a checkpoint of the release was trained on")
    add_prediction(add)
    args = parser.parse_args()
    if not is_onnx(args.output):
        raise RunError(f"--output {args.output}: expected a name that ends in .onnx")
    if is_onnx(args.checkpoint):
        raise RunError(f"--checkpoint {args.checkpoint} is an ONNX file already: give the best.pth it was made from")
    return args


def describe(predictor: Predictor, checkpoint: Path) -> dict[str, Any]:
    """Return the metadata of the file as plain values: its input, its output and its origin."""
    config, banks = predictor.model.config, list(predictor.model.memory_banks())
    facts = {name: config[name] for name in ("num_classes", "in_channels", "img_size")}
    classes, channels, size = facts.values()
    in_warmup = any(bank.in_warmup for bank in banks)
    origin = {name: value for name, value in predictor.origin.items() if name not in ("args", "described", "seen")}
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    meaning = "logits; their arg max over axis 1 is the class"
    return {
        "format": 1,
        "network": config,
        "memory": "frozen, in warm-up and so not read" if in_warmup else "frozen" if banks else "none",
        "input": {"name": INPUT, "type": "float32", "shape": ["B", channels, size, size]},
        "output": {"name": OUTPUT, "type": "float32", "shape": ["B", classes, size, size], "meaning": meaning},
        **facts,
        "dataset": predictor.data.get("dataset"),
        "class_names": list(predictor.class_names),
        "label_order": ["background", *predictor.class_names],
        "channels": list(predictor.channels),
        "preprocessing": predictor.preprocessing.to_dict(),
        "preprocessing_steps": predictor.preprocessing.described(size),
        "checkpoint": {"file": checkpoint.name, "sha256": digest, **origin},
    }


def trace(network: SummedLogits) -> torch.onnx.ONNXProgram:
    """Return the ONNX program of a network on the CPU, for any batch size.

    Raises RunError: torch.export cannot trace the network.
    """
    config = network.config
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)  # its warnings are harmless
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they report every step
    image = torch.zeros(2, config["in_channels"], config["img_size"], config["img_size"])
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # torch prints long reports
            batch = {0: torch.export.Dim.DYNAMIC}
            program = torch.export.export(network, (image,), dynamic_shapes={INPUT: batch}, strict=False)
    except Exception as error:  # torch raises many kinds of error
        raise RunError(
            f"torch.export cannot trace network {config['network']} ({brief(error)}): its forward() must not branch on "
            "tensor values or on the batch size"
        ) from error
    return torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=20,  # newer opsets have an attention operator, which some runtimes lack
        dynamic_shapes={INPUT: {0: "batch"}},
        dynamo=True,
        verbose=False,
        optimize=False,  # takes minutes, and onnxruntime does the same in seconds when it opens the file
    )


@torch.inference_mode()
def check(path: Path, network: SummedLogits) -> None:
    """Compare an ONNX file with PyTorch on random images, on the CPU and on a GPU if onnxruntime can use it.

    Raises RunError: the largest difference exceeds ``TOLERANCE`` times the larger of the largest logit and 1.
    """
    channels, size = (network.config[name] for name in ("in_channels", "img_size"))
    gpu = torch.cuda.is_available() and "CUDAExecutionProvider" in require("onnxruntime").get_available_providers()
    for device in ("cpu", "auto") if gpu else ("cpu",):
        exported = OnnxNetwork(path, device)
        if device == "auto" and exported.session.get_providers()[0] == "CPUExecutionProvider":
            break  # the CUDA provider did not load (a warning says so); the check on the CPU has passed
        for batch_size in (1, 3):  # the network is traced with 2
            image = torch.rand(batch_size, channels, size, size)
            expected, (found,) = network(image), exported(image)
            fits, largest = found.shape == expected.shape, expected.abs().max()
            difference = (found - expected).abs().nan_to_num(torch.inf).max() if fits else torch.inf
            numbers = f"largest difference from PyTorch {difference:.1e}, largest logit {largest:.3g}"
            logger.info("%s, batch of %d: %s", device, batch_size, numbers)
            if not difference <= TOLERANCE * max(largest, 1):  # NaN fails too
                raise RunError(
                    f"no file was written: on {device}, {numbers}; expected at most {TOLERANCE:g} times "
                    "the larger of that logit and 1: install the versions in constraints.txt"
                )


def main() -> None:
    args = parse_args()
    seed_everything(0)
    require("onnx", "onnxscript", "onnxruntime")  # before anything slow
    check_writable(args.output.parent)
    predictor = Predictor(args.checkpoint, "cpu", info=DATASETS.get(args.dataset), prediction=args.prediction)
    metadata = describe(predictor, args.checkpoint)
    if "warm-up" in metadata["memory"]:
        logger.warning("%s: still in warm-up, so neither the network nor the file reads a memory", args.checkpoint)
    if metadata["memory"] != "none" and metadata["network"].get("variant") == "release":
        logger.warning(
            "variant release writes its memory in evaluation, but the exported network does not, so the predictions of "
            "the file differ a little from those of the authors' program"
        )
    network = SummedLogits(predictor.model)
    logger.info("tracing %s; this can take some minutes at the paper's size", args.checkpoint)
    program = trace(network)
    program.model.metadata_props[KEY] = json.dumps(metadata, indent=2)
    with atomic_write(args.output) as temporary:
        program.save(temporary, external_data=False)
        check(temporary, network)
    logger.info("wrote %s, %.1f MiB", args.output, args.output.stat().st_size / 2**20)


if __name__ == "__main__":
    run_script(main)
