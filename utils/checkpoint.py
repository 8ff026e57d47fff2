"""Checkpoints: written whole or not at all, read without running any code from the file."""

import os
import pickle
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from utils.errors import RunError
from utils.files import atomic_write

PACKAGES = ("torch", "timm", "numpy", "scipy", "faiss-gpu", "faiss-cpu", "h5py")
# What every checkpoint of ours has: enough to rebuild the network and to read its output.
REQUIRED = ("model", "network", "data")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of these) to ``path`` in one move.

    Raises:
        RunError, OSError: there is no room, or the folder cannot be written; the file that was there stays.
    """
    with atomic_write(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # before its name is, so that a machine that dies leaves no empty file
        except RuntimeError as error:  # how torch reports a write cut short
            reason = str(error).splitlines()[0]
            raise RunError(f"{path} could not be written ({reason}): make room on the disk") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into the CPU's memory; nothing but tensors and plain values is accepted from the file.

    A file without our keys is returned as ``{"release": state_dict}`` where it is a bare state dict.

    Raises:
        RunError: the file is missing, truncated, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}: train first, or give the path of a best.pth or last.pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        raise RunError(
            f"{path} is not a checkpoint, or one cut off ({type(error).__name__}): "
            "give a best.pth or last.pth, or copy it again"
        ) from error
    if not isinstance(state, dict):
        raise RunError(f"{path} holds a {type(state).__name__}, expected a checkpoint of this project or the release")
    if all(key in state for key in REQUIRED):
        return state
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        return {"release": state}
    raise RunError(f"{path} is not a checkpoint of this project or the release: it lacks {', '.join(REQUIRED)}")


def build_network(
    checkpoint: dict[str, Any],
    path: str | Path,
    network: Callable[..., torch.nn.Module],
    load_release: Callable[[torch.nn.Module, dict], None],
    release_channels: int = 1,
) -> torch.nn.Module:
    """Rebuild the trained network of a checkpoint (ours or the release's) on the CPU, without any flag.

    Args:
        checkpoint: what ``load_checkpoint`` returned.
        path: where it came from, for messages.
        network: the class to build, ``SimMPNet``.
        load_release: ``load_release_state_dict``.
        release_channels: of the images, 1 or 3, which a checkpoint of the release does not say.
    """
    if "release" in checkpoint:
        weights = {name.removeprefix("module."): value for name, value in checkpoint["release"].items()}
        model = network(**release_config(weights, path), in_channels=release_channels)
        try:
            load_release(model, weights)
        except ValueError as error:
            raise RunError(f"{path}: {error}") from error
    else:
        try:
            model = network(**checkpoint["network"])
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{path}: its weights do not fit the network that it describes, {error}") from error
    return model.to(memory_format=torch.channels_last)  # as it was trained, and faster


def release_config(weights: dict[str, torch.Tensor], path: str | Path) -> dict[str, Any]:
    """Return the arguments of the network that a state dict of the release belongs to; it is always small/256."""
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
        raise RunError(f"{path} is a bare state dict without {error}: neither ours nor the release's") from error


def provenance() -> dict[str, Any]:
    """Return the git revision (``+`` where files have changed since) and the versions that a run depends on."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"git": _git_revision(), "versions": versions}


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # a copy without git
