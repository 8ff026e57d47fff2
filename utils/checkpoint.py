"""Checkpoints: written whole or not at all, read without running any code from the file."""

import os
import platform
import subprocess
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from datasets.errors import brief
from datasets.files import atomic_write
from utils.errors import RunError

PACKAGES = ("torch", "timm", "numpy", "scipy", "faiss-gpu", "faiss-cpu", "h5py", "segmentation-models-pytorch", "monai")
# What every checkpoint of ours has: enough to rebuild the network and to read its output.
REQUIRED = ("model", "network", "data")
MAX_SIDE = 2048
"""Largest side in pixels of the images that a checkpoint's network may take: MaxViT's tables of positions grow with its
fourth power, to 3 GiB there at the paper's scale."""


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

    A file without our keys is returned as ``{"release": state_dict}`` where it is a bare state dict. What is returned
    takes no more memory than the file has bytes, and every byte of the file agrees with its checksum.

    Raises:
        RunError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}: train first, or give the path of a best.pth or last.pth")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and its unpickler each have their own
        raise RunError(
            f"{path} is not a checkpoint, or one cut off or damaged ({type(error).__name__}: {brief(error, 100)}): "
            "give a best.pth or last.pth, or copy it again"
        ) from error
    if not isinstance(state, dict):
        raise RunError(f"{path} holds a {type(state).__name__}, expected a checkpoint of this project or the release")
    if all(key in state for key in REQUIRED):
        _check_content(state, path)
        return state
    if _is_state_dict(state) and state:
        return {"release": state}
    raise RunError(f"{path} is not a checkpoint of this project or the release: it lacks {', '.join(REQUIRED)}")


def _check_archive(path: Path) -> None:
    """Raise an error unless every record is stored once and as its checksum says; torch compares none of them."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) < len(records):
            raise ValueError("a record stands there twice")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a record is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are longer than the file")
        for record in records:
            with archive.open(record) as stream:
                while stream.read(2**20):
                    pass


def _check_content(state: dict[str, Any], path: Path) -> None:
    """Raise RunError unless the parts of a checkpoint that everything reads are of the types that it has."""
    network, data = state["network"], state["data"]
    names = data.get("class_names") if isinstance(data, dict) else None
    if not _is_state_dict(state["model"]):
        raise RunError(f"{path}: its 'model' is not a dictionary of plain tensors: copy it again, or train anew")
    # "pretrained" would fetch or read another file.
    if not (isinstance(network, dict) and all(isinstance(key, str) for key in network) and "pretrained" not in network):
        raise RunError(f"{path}: its 'network' is not the arguments of one: copy it again, or train anew")
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n.isprintable() and n for n in names):
        raise RunError(f"{path}: its 'class_names' are {brief(names)}, text was expected: copy it again, or train anew")
    for key in ("dataset", "selected_on", "kind"):
        if not isinstance(data.get(key, ""), str):
            raise RunError(
                f"{path}: its {key!r} is {brief(data[key])}, text was expected: copy it again, or train anew"
            )


def _is_state_dict(values: Any) -> bool:
    """Return whether this is a dictionary of plain tensors by name, none larger than the numbers stored for it."""
    return isinstance(values, dict) and all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        for name, value in values.items()
    )


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
        network: builds one from the arguments that a checkpoint holds: ``networks.build``.
        load_release: ``load_release_state_dict``.
        release_channels: of the images, 1 or 3, which a checkpoint of the release does not say.
    """
    if "release" in checkpoint:
        weights = {name.removeprefix("module."): value for name, value in checkpoint["release"].items()}
        config = release_config(weights, path) | {"in_channels": release_channels}
    else:
        weights, config = checkpoint["model"], checkpoint["network"]
    try:
        if "release" not in checkpoint:
            _check_described(network, config, weights, path)
        model = network(**config)
        load_release(model, weights) if "release" in checkpoint else model.load_state_dict(weights)
    except Exception as error:  # a description of anything may fail anywhere
        raise RunError(f"{path}: its weights do not fit the network that it describes, {brief(error)}") from error
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise RunError(f"{path}: {name} has values that are NaN or infinite: take an earlier checkpoint")
    return model.to(memory_format=torch.channels_last)  # as it was trained, and faster


def _check_described(
    network: Callable[..., torch.nn.Module], config: dict[str, Any], weights: dict[str, torch.Tensor], path: str | Path
) -> None:
    """Raise RunError for a network that its weights do not fit, before it takes any memory."""
    for name in ("img_size", "img_size_dmwla"):
        size = config.get(name, 1)
        if type(size) is not int or not 0 < size <= MAX_SIDE:
            raise ValueError(f"{name} {brief(size, 40)}, expected 1 to {MAX_SIDE} pixels")
    with torch.device("meta"):
        described = {name: tuple(value.shape) for name, value in network(**config).state_dict().items()}
    held = {name: tuple(value.shape) for name, value in weights.items()}
    odd = [name for name in described.keys() | held.keys() if described.get(name) != held.get(name)]
    if odd:
        name = min(odd)
        raise ValueError(f"{brief(name, 100)} is {held.get(name)}, expected {described.get(name)}")


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
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RunError(f"{path}: its memory banks are of another shape than the release's: copy it again") from error


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
