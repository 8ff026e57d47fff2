"""A network in an ONNX file of ``export.py``, which onnxruntime runs; it is called like a PyTorch network."""

import json
import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import pick_device
from utils.errors import RunError

logger = logging.getLogger(__name__)

KEY = "sim_mpnet"
"""Key of the file's metadata; its value is a JSON object."""

INPUT, OUTPUT = "image", "logits"
CUDA_REMEDY = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
FACTS = ("num_classes", "in_channels", "img_size", "dataset", "class_names", "preprocessing", "checkpoint")
"""Metadata that prediction needs."""


class OnnxNetwork(nn.Module):
    """Run an ONNX file of ``export.py`` as a network: images, float32 (B, C, S, S), to a list of one logit map.

    The map is (B, num_classes, S, S). device: ``auto`` means a GPU if onnxruntime can use one, otherwise the CPU.
    ``metadata``: the facts that ``docs/export.md`` lists. Raises RunError if onnxruntime is not installed, if the file
    is missing or was not written by ``export.py``, or if the device is not available.
    """

    def __init__(self, path: str | Path, device: str = "auto"):
        super().__init__()
        runtime = require("onnxruntime")
        if not Path(path).is_file():
            raise RunError(f"no file at {path}: write one with export.py, or correct --checkpoint")
        place = pick_device(device)
        providers: list[Any] = ["CPUExecutionProvider"]
        if place.type == "cuda":
            if hasattr(runtime, "preload_dlls"):
                runtime.preload_dlls()  # loads the CUDA libraries that PyTorch came with
            # Full float32, and no search for the fastest convolution at each new batch size.
            exact = {"device_id": place.index or 0, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
            providers.insert(0, ("CUDAExecutionProvider", exact))
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # only errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            try:
                self.session = runtime.InferenceSession(str(path), options, providers=providers)
            except Exception:  # some versions raise if the CUDA provider does not load
                self.session = runtime.InferenceSession(str(path), options, providers=providers[-1:])
        except Exception as error:  # the exceptions of onnxruntime have no common base class
            raise RunError(
                f"{path} is not an ONNX file that onnxruntime {runtime.__version__} can open ({type(error).__name__}): "
                "write it again with export.py"
            ) from error
        try:
            self.metadata: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map[KEY])
            missing = [name for name in FACTS if name not in self.metadata]
        except (KeyError, ValueError, TypeError):
            missing = [KEY]
        if missing:
            raise RunError(f"{path} has no metadata of this project ({', '.join(missing)}): write it with export.py")
        self.config = {name: self.metadata[name] for name in ("num_classes", "in_channels", "img_size")}
        self.config["variant"] = self.metadata["network"].get("variant")
        if place.type == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            problem = f"onnxruntime {runtime.__version__} cannot compute on the GPU"
            if device != "auto":
                raise RunError(f"--device {device}: {problem}: {CUDA_REMEDY}, or use --device cpu")
            logger.warning("%s and runs on the CPU: %s", problem, CUDA_REMEDY)

    def forward(self, image: Tensor) -> list[Tensor]:
        # onnxruntime itself copies the images to its device.
        return [torch.from_numpy(self.session.run([OUTPUT], {INPUT: image.contiguous().numpy()})[0])]


def is_onnx(path: str | Path) -> bool:
    """Return whether a path ends in .onnx."""
    return Path(path).suffix.lower() == ".onnx"


def require(*names: str) -> ModuleType:
    """Import optional packages and return the first; raise RunError if one is not installed."""
    try:
        modules = [import_module(name) for name in names]
    except ImportError as error:
        raise RunError(
            f"ONNX needs {error.name or names[0]}, which is not installed: "
            "pip install -r requirements-export.txt -c constraints.txt"
        ) from error
    return modules[0]
