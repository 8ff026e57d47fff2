"""Checkpoints: written whole or not at all, and read without running code from the file."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from datasets.errors import brief
from datasets.files import atomic_write
from networks import build, load_release_state_dict
from utils.errors import RunError

PACKAGES = ("torch", "timm", "numpy", "scipy", "faiss-gpu", "faiss-cpu", "h5py", "segmentation-models-pytorch", "monai")
REQUIRED = ("model", "network", "data")
"""The keys of every checkpoint of ours: enough to rebuild the network and to name its classes."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of these) to ``path``, whole or not at all.

    Raises:
        RunError, OSError: the disk is full, or the folder cannot be written to; a file that was there stays.
    """
    with atomic_write(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # before the file is renamed: a power cut then leaves no empty file
        except RuntimeError as error:  # torch's error for a write that was cut short
            reason = str(error).splitlines()[0]
            raise RunError(f"{path} could not be written ({reason}): make room on the disk") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory; the file may hold only tensors and plain values.

    Returns:
        The dictionary that was saved; of a bare state dict, such as the release's, ``{"release": state_dict}``.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}: train first, or give the path of a best.pth or last.pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and its unpickler raise many kinds
        raise RunError(
            f"{path} is no checkpoint, or it is damaged ({type(error).__name__}: {brief(error, 100)}): "
            "give a best.pth or last.pth, or copy it again"
        ) from error
    if isinstance(state, dict) and not all(key in state for key in REQUIRED):
        state = {"release": state}
    if not _has_the_right_types(state):
        raise RunError(f"{path} does not hold what this project or the release saves: copy it again, or train again")
    return state


def _has_the_right_types(state: Any) -> bool:
    """Return whether the parts of a checkpoint that every reader uses are of the types that training saves."""
    try:
        if "release" not in state:
            data = state["data"]
            texts = [*data["class_names"], *(data.get(key, "") for key in ("dataset", "selected_on", "kind"))]
            # A network may not name "pretrained" weights: building it would read or download another file.
            if "pretrained" in state["network"] or not all(map(str.isprintable, texts)):
                return False
        weights = state["release" if "release" in state else "model"]
        return bool(weights) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items())
    except (AttributeError, KeyError, TypeError):
        return False


def build_network(checkpoint: dict[str, Any], path: str | Path, release_channels: int = 1) -> torch.nn.Module:
    """Rebuild the trained network of a checkpoint, ours or the release's, on the CPU.

    Args:
        checkpoint: what ``load_checkpoint`` returned.
        path: its file, for messages.
        release_channels: 1 or 3, the channels of the images, which a checkpoint of the release does not say.

    Raises:
        RunError: the weights do not fit the network that the checkpoint describes, or are not finite.
    """
    try:
        if "release" in checkpoint:
            weights = {name.removeprefix("module."): value for name, value in checkpoint["release"].items()}
            model = build(**_release_arguments(weights, path), in_channels=release_channels)
            load_release_state_dict(model, weights)
        else:
            with torch.device("meta"):  # takes no memory, whatever sizes are described
                build(**checkpoint["network"]).load_state_dict(checkpoint["model"], assign=True)
            model = build(**checkpoint["network"])
            model.load_state_dict(checkpoint["model"])
    except RunError:
        raise
    except Exception as error:  # the description may hold anything
        raise RunError(f"{path}: its weights do not fit the network that it describes, {brief(error)}") from error
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise RunError(f"{path}: {name} has values that are NaN or infinite: use an earlier checkpoint")
    return model.to(memory_format=torch.channels_last)  # as in training, and faster


def _release_arguments(weights: dict[str, torch.Tensor], path: str | Path) -> dict[str, Any]:
    """Return the arguments of the network that a state dict of the release belongs to; its scale is always small."""
    try:
        feature_dim, num_clusters = weights["DMWLA_1.0.concept_proto"].shape
        decoder_feature_dim, decoder_num_clusters = weights["decoder.DMWLA_1.concept_proto"].shape
        return dict(
            num_classes=len(weights["out_head1.bias"]),
            variant="release",
            feature_dim=feature_dim,
            num_clusters=num_clusters,
            decoder_feature_dim=decoder_feature_dim,
            decoder_num_clusters=decoder_num_clusters,
            columns_per_cluster=weights["DMWLA_1.0.concept_pool"].shape[1] // num_clusters,
        )
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RunError(f"{path} is not a checkpoint of this project or of the release: give one of either") from error


def provenance() -> dict[str, Any]:
    """Return the git revision (``+`` if files have changed since) and the versions of Python, CUDA and packages."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = None  # a copy without git
    return {"git": git, "versions": versions}
