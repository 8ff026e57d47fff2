"""The trained network as one file, a program of torch.export or ONNX: made, checked against PyTorch, and opened again.

Both kinds take images (B, C, S, S), float32, of any B, give the summed logit maps (B, num_classes, S, S), and carry the
same metadata: what goes in, what comes out, and from which checkpoint.
"""

import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from datasets.errors import brief
from utils.cli import pick_device
from utils.errors import RunError

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
"""How the file of each format ends."""

KEY = "sim_mpnet"
"""Of the metadata: a metadata property of an ONNX file, ``extra/sim_mpnet.json`` in the archive of torch.export."""

INPUT, OUTPUT = "image", "logits"
OPSET = 20  # the newest whose attention is written out in products and a softmax, which every runtime has
TOLERANCE = 1e-4
PACKAGES = "pip install -r requirements-export.txt -c constraints.txt"


class Bank(Protocol):
    """What this room asks of a memory; `networks.PrototypeMemoryBank` has it."""

    in_warmup: bool
    writable: bool


class Network(Protocol):
    """What this room asks of a network that is to be exported; what `networks.build` gives has it."""

    config: dict[str, Any]

    def __call__(self, x: Tensor) -> list[Tensor]: ...

    def memory_banks(self) -> Iterator[Bank]: ...


class SummedLogits(nn.Module):
    """A network in evaluation with its memory frozen: (B, C, S, S) to the sum of its logit maps, whose argmax predicts.

    network: is put into evaluation mode, its memory frozen, without gradients, its weights in contiguous memory.
    """

    def __init__(self, network: Network):
        super().__init__()
        for bank in network.memory_banks():
            bank.writable = False
        self.config = network.config
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor) -> Tensor:
        return reduce(torch.add, self.network(image))


class ExportedNetwork(nn.Module):
    """An opened export in the network's place: (B, C, S, S) on ``device`` to a list of one logit map, the sum of all.

    metadata: what ``describe`` gave; config: ``num_classes``, ``in_channels`` and ``img_size`` of it.
    """

    def __init__(self, metadata: dict[str, Any], run: Callable[[Tensor], Tensor], device: torch.device):
        super().__init__()
        self.metadata, self.device, self._run = metadata, device, run
        self.config = {name: metadata[name] for name in ("num_classes", "in_channels", "img_size")}

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self._run(image)]


@dataclass(frozen=True)
class Agreement:
    """How an export's logits compare with PyTorch's.

    difference: the largest; scale: the largest logit, or 1 where that is less; other_class: share of the pixels that
    get another class.
    """

    difference: float
    scale: float
    other_class: float

    @property
    def good(self) -> bool:
        """Whether no logit differs by more than 1e-4 of the largest."""
        return self.difference <= TOLERANCE * self.scale


def is_export(path: str | Path) -> bool:
    """Whether a path ends as the file of an export does."""
    return Path(path).suffix.lower() in ENDINGS.values()


def describe(
    network: Network,
    dataset: str | None,
    class_names: Sequence[str],
    preprocessing: dict[str, Any],
    steps: str,
    checkpoint: dict[str, Any],
) -> dict[str, Any]:
    """Return the metadata of an export, plain values.

    Args:
        network: the one that is exported.
        dataset: what it was trained on, if that is known.
        class_names: without background, in the order of their label ids.
        preprocessing: plain values, as a checkpoint has them.
        steps: the same in words.
        checkpoint: what says which one it was.
    """
    size, channels, classes = (network.config[name] for name in ("img_size", "in_channels", "num_classes"))
    in_warmup = [bank.in_warmup for bank in network.memory_banks()]
    memory = "frozen, in warm-up and so not read" if any(in_warmup) else "frozen" if in_warmup else "none"
    return {
        "format": 1,
        "network": network.config,
        "memory": memory,
        "input": {"name": INPUT, "type": "float32", "shape": ["B", channels, size, size]},
        "output": {
            "name": OUTPUT,
            "type": "float32",
            "shape": ["B", classes, size, size],
            "meaning": "logits, those of several maps added; their argmax over axis 1 is the class",
        },
        "num_classes": classes,
        "in_channels": channels,
        "img_size": size,
        "dataset": dataset,
        "class_names": list(class_names),
        "label_order": ["background", *class_names],
        "preprocessing": preprocessing,
        "preprocessing_steps": steps,
        "checkpoint": checkpoint,
    }


def trace(network: SummedLogits) -> torch.export.ExportedProgram:
    """Return the program of a network on the CPU, for any batch size.

    Raises:
        RunError: the network does what cannot be traced.
    """
    config = network.config
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)  # which warns of it, too
    image = torch.zeros(2, config["in_channels"], config["img_size"], config["img_size"])
    with torch.no_grad():
        network(image)  # each bank looks up whether it is in warm-up, which cannot be traced
        batch = {0: torch.export.Dim.DYNAMIC}
        try:
            with redirect_stderr(io.StringIO()):  # where torch prints pages of what is said below
                return torch.export.export(network, (image,), dynamic_shapes={INPUT: batch}, strict=False)
        except Exception as error:  # torch raises many kinds
            raise RunError(
                f"torch.export cannot trace network {config['network']}, {brief(error)}: control flow in its forward "
                "must not hang on a tensor's values or on the batch size"
            ) from error


def write_export(path: Path, program: torch.export.ExportedProgram, metadata: dict[str, Any]) -> None:
    """Write a program with its metadata, in the format that the path's ending says.

    Raises:
        RunError: a package that ONNX needs is not installed.
    """
    text = json.dumps(metadata, indent=2)
    if path.suffix == ENDINGS["torch"]:
        torch.export.save(program, path, extra_files={f"{KEY}.json": text})
        return
    require("onnx", "onnxscript")
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they report every step
    exported = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamic_shapes={INPUT: {0: "batch"}},
        dynamo=True,
        verbose=False,
        optimize=False,  # takes minutes, and onnxruntime does the same in seconds when it opens the file
    )
    exported.model.metadata_props[KEY] = text
    exported.save(path, external_data=False)


def open_export(path: str | Path, device: str = "auto", amp: str = "none") -> ExportedNetwork:
    """Open an export as a network to predict with.

    Args:
        path: a ``.onnx`` or ``.pt2`` file of ``write_export``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; of an ONNX file, which provider of onnxruntime runs it.
        amp: must be ``none``, an export computes in float32.

    Raises:
        RunError: the file is none, or not there; onnxruntime is not installed; the device is not to be had.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"no export at {path}: make one with export.py, or correct the path")
    if amp != "none":
        raise RunError(f"--amp {amp}: {path} is an export, which computes in float32; leave --amp out")
    return (_open_torch if path.suffix.lower() == ENDINGS["torch"] else _open_onnx)(path, device)


def devices_here(path: Path) -> list[str]:
    """Return the devices that an export can be checked on here: the CPU, and a GPU where its format can use one."""
    cuda = torch.cuda.is_available()
    if path.suffix == ENDINGS["onnx"]:
        cuda = cuda and "CUDAExecutionProvider" in require("onnxruntime").get_available_providers()
    return ["cpu", "cuda"] if cuda else ["cpu"]


@torch.inference_mode()
def compare(network: SummedLogits, exported: ExportedNetwork, batch_size: int) -> Agreement:
    """Run the network, on the CPU, and its export on random images, and compare their logits."""
    channels, size = (network.config[name] for name in ("in_channels", "img_size"))
    image = torch.rand(batch_size, channels, size, size, generator=torch.Generator().manual_seed(batch_size))
    expected = network(image)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which PyTorch allows to convolutions
        (found,) = exported(image.to(exported.device))
    found = found.cpu()
    if found.shape != expected.shape:
        raise RunError(f"the export gives {tuple(found.shape)} where PyTorch gives {tuple(expected.shape)}")
    return Agreement(
        difference=(found - expected).abs().nan_to_num(torch.inf).max().item(),
        scale=max(expected.abs().max().item(), 1.0),
        other_class=(found.argmax(1) != expected.argmax(1)).float().mean().item(),
    )


def require(*names: str) -> ModuleType:
    """Import the optional packages and return the first; raises RunError where one is missing."""
    try:
        modules = [import_module(name) for name in names]
    except ImportError as error:
        raise RunError(f"ONNX needs {error.name or names[0]}, which is not installed: {PACKAGES}") from error
    return modules[0]


def _open_torch(path: Path, device: str) -> ExportedNetwork:
    # The metadata first, so that a file of another kind is never unpickled.
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"extra/{KEY}.json")), None)
            text = archive.read(name).decode() if name else None
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is no export, or one cut off: make it anew with export.py, or copy it again") from error
    metadata = _metadata(path, text)
    place = pick_device(device)
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it prints a traceback of what is said below
    try:
        program = torch.export.load(path)
        if place.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, str(place))
        module = program.module()
    except Exception as error:  # torch raises many kinds for a damaged archive or one of another version
        made = metadata["checkpoint"].get("versions", {}).get("torch", "another version")
        raise RunError(
            f"{path} cannot be opened by PyTorch {torch.__version__} ({type(error).__name__}; its checkpoint is of "
            f"{made}): make it anew with export.py, here"
        ) from error
    return ExportedNetwork(metadata, lambda image: module(image), place)


def _open_onnx(path: Path, device: str) -> ExportedNetwork:
    runtime = require("onnxruntime")
    wanted = _cuda_number(runtime, path, device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if wanted is not None:
        if hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()  # those that came with PyTorch
        # Without TensorFloat-32, and without a search for the fastest convolution at each new batch size.
        options = {"device_id": wanted, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
        providers.insert(0, ("CUDAExecutionProvider", options))
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own kinds have no common class
        raise RunError(
            f"{path} is no ONNX file that onnxruntime {runtime.__version__} can open, or one cut off "
            f"({type(error).__name__}): make it anew with export.py, or copy it again"
        ) from error
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(KEY))
    if wanted is not None and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RunError(
            f"--device {device}: onnxruntime {runtime.__version__} could not start its CUDA provider: install the "
            "CUDA and cuDNN that it was built for, or use --device cpu"
        )

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: image.contiguous().numpy()})[0])

    return ExportedNetwork(metadata, run, torch.device("cpu"))  # onnxruntime itself takes the images to its device


def _cuda_number(runtime: ModuleType, path: Path, device: str) -> int | None:
    """Return the GPU that onnxruntime is to use, or None for the CPU."""
    has_cuda = "CUDAExecutionProvider" in runtime.get_available_providers()
    if device == "auto" and not (has_cuda and torch.cuda.is_available()):
        return None
    if device.startswith("cuda") and not has_cuda:
        raise RunError(
            f"--device {device}: onnxruntime {runtime.__version__} has no CUDA provider to run {path} on: pip "
            "uninstall onnxruntime, pip install onnxruntime-gpu, or use --device cpu"
        )
    place = pick_device(device)
    return None if place.type == "cpu" else place.index or 0


def _metadata(path: Path, text: str | None) -> dict[str, Any]:
    """Return an export's metadata from its JSON; raises RunError where it is none of ours."""
    try:
        metadata = json.loads(text or "")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise RunError(f"{path} has no metadata of this project: make it with export.py from a checkpoint")
    if missing := [name for name in METADATA if name not in metadata]:
        raise RunError(f"{path} lacks {', '.join(missing)} in its metadata: make it anew with export.py")
    return metadata


METADATA = ("num_classes", "in_channels", "img_size", "dataset", "class_names", "preprocessing", "checkpoint")
"""What is needed of an export's metadata to predict with it."""
