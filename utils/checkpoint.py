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
    if not isinstance(state, dict):
        raise RunError(f"{path} holds a {type(state).__name__}, expected a checkpoint of this project or the release")
    if all(key in state for key in REQUIRED):
        _check_content(state, path)
        return state
    if state and _is_state_dict(state):
        return {"release": state}
    raise RunError(f"{path} is not a checkpoint of this project or the release: it has no {', '.join(REQUIRED)}")


def _check_content(state: dict[str, Any], path: Path) -> None:
    """Raise RunError unless the parts that every reader uses have the right types."""
    network, data = state["network"], state["data"]
    names = data.get("class_names") if isinstance(data, dict) else None
    texts = isinstance(names, list | tuple) and all(isinstance(n, str) and n.isprintable() and n for n in names)
    # A network may not name "pretrained" weights: building it would read or download another file.
    arguments = isinstance(network, dict) and all(isinstance(key, str) and key != "pretrained" for key in network)
    for part, fits in (("model", _is_state_dict(state["model"])), ("network", arguments), ("class_names", texts)):
        if not fits:
            raise RunError(f"{path}: its {part!r} is not what training saves: copy it again, or train again")
    for key in ("dataset", "selected_on", "kind"):
        if not isinstance(data.get(key, ""), str):
            raise RunError(f"{path}: its {key!r} is {brief(data[key])}, expected text: copy it again, or train again")


def _is_state_dict(values: Any) -> bool:
    """Return whether this is a dictionary of tensors by name, none of them larger than the numbers stored for it."""
    return isinstance(values, dict) and all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


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
            with torch.device("meta"):  # takes no memory
                described = build(**checkpoint["network"]).state_dict()
            _check_shapes(described, checkpoint["model"])
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


def _check_shapes(described: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for the first weight that is missing, or has another name or shape."""
    for name in sorted(described.keys() | weights.keys()):
        expected, found = (tuple(d[name].shape) if name in d else None for d in (described, weights))
        if expected != found:
            raise ValueError(f"{brief(name, 100)} is {found}, expected {expected}")


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
    except KeyError as error:
        raise RunError(f"{path} has neither our keys nor the release's {error}: give a checkpoint of either") from error
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RunError(f"{path}: its memory banks have other shapes than the release's: copy it again") from error


def provenance() -> dict[str, Any]:
    """Return the git revision (``+`` if files have changed since) and the versions of Python, CUDA and packages."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parents[1]),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=12",
    ]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = None  # a copy without git
    return {"git": git, "versions": versions}
