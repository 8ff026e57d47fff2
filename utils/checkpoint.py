"""Write and read checkpoints, rebuild their networks, and compare the data of a run with those of its checkpoint."""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import Volume
from datasets.errors import brief
from datasets.files import atomic_write
from datasets.training_set import TrainingSet
from networks import DEFAULT_NETWORK, DMWLA, NETWORKS, NetworkError, PrototypeMemoryBank, build
from networks.release import load_release_state_dict, release_arguments
from utils.errors import RunError

PACKAGES = ("torch", "timm", "numpy", "scipy", "faiss-gpu", "faiss-cpu", "h5py", "segmentation-models-pytorch", "monai")
REQUIRED = ("model", "network", "data")
"""The keys that every checkpoint of this project has: enough to rebuild the network and to name its classes."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of these) to ``path``, whole or not at all.

    Raises RunError or OSError if the disk is full or the folder cannot be written to; an existing file then stays.
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


def on_cpu(state: Any) -> Any:
    """Copy tensors, and dictionaries and lists that hold them, to CPU memory; later steps do not change the copy."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy(state)  # also copies the versions that a module's state dict carries
        copied.update((name, on_cpu(value)) for name, value in state.items())
        return copied
    return type(state)(map(on_cpu, state)) if isinstance(state, list | tuple) else state


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, which may hold only tensors and plain values, into CPU memory; return what was saved.

    A bare state dict, such as the release's, becomes ``{"release": state_dict}``. Raises RunError for a file that is
    missing, damaged, or not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = [str(path / name) for name in ("best.pth", "last.pth") if (path / name).is_file()]
        raise RunError(f"{path} is a folder: give {' or '.join(found) or 'the path of a best.pth or last.pth'}")
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}: train first, or give the path of a best.pth or last.pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}: {brief(error, 100)}): try again") from error
    except Exception as error:  # torch raises many kinds of errors, whose messages are about unpickling
        remedy = "give a best.pth or last.pth (only predict.py reads ONNX files), or copy the file again"
        raise RunError(f"{path} is no checkpoint of this project, or it is damaged: {remedy}") from error
    if isinstance(state, dict) and not all(key in state for key in REQUIRED):
        state = {"release": state}
    if not isinstance(state, dict) or not _has_the_right_types(state):
        raise RunError(f"{path} is not a checkpoint of this project or of the release: copy it again, or train again")
    if isinstance(state.get("seen"), list):  # an older run stored only the cases of its own data set
        state["seen"] = {state["data"]["dataset"]: state["seen"]}
    return state


def _has_the_right_types(state: Any) -> bool:
    """Return whether the parts of a checkpoint that every reader uses have the types that training saves."""
    try:
        if "release" not in state:
            data = state["data"]
            texts = [*data["class_names"], *(data.get(key, "") for key in ("dataset", "selected_on", "kind"))]
            # "pretrained" must not be among the arguments: building the network would read or download another file.
            if "pretrained" in dict(state["network"]) or not all(map(str.isprintable, texts)):
                return False
        weights = state["release" if "release" in state else "model"]
        return bool(weights) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def build_network(
    checkpoint: dict[str, Any], path: str | Path, channels: int | None = None, prediction: str | None = None
) -> torch.nn.Module:
    """Rebuild the trained network of a checkpoint, ours or the release's, on the CPU.

    checkpoint: what ``load_checkpoint`` returned; path: its file, for messages; channels: number of image channels,
    None: as in the checkpoint, or 1 for the release, which does not store it; prediction: replaces the checkpoint's.
    Raises RunError if the weights are not finite or do not fit the network that the checkpoint describes, or if this
    network has another number of classes or channels than the data.
    """
    options, names = network_arguments_of(checkpoint, path), checkpoint.get("data", {}).get("class_names")
    try:
        if "release" in checkpoint:
            model = build(**options, in_channels=channels or 1)
            load_release_state_dict(model, checkpoint["release"])
        else:
            with torch.device("meta"):  # takes no memory, even if the described sizes are huge
                build(**options).load_state_dict(checkpoint["model"], assign=True)
            model = build(**options)
            model.load_state_dict(checkpoint["model"])
    except Exception as error:  # the description may hold anything
        raise RunError(f"{path}: its weights do not fit the network that it describes, {brief(error)}") from error
    has = model.config["num_classes"], model.config["in_channels"]
    expected = has[0] if names is None else len(names) + 1, channels or has[1]
    if has != expected:
        raise RunError(
            f"{path}: its network has {has[0]} classes with background and {has[1]} input channels, but its data have "
            f"{expected[0]} and {expected[1]}: give the data that it was trained on, or train again"
        )
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise RunError(f"{path}: {name} has values that are NaN or infinite: use an earlier checkpoint")
    if prediction is not None:
        if "prediction" not in model.config:
            name = options["network"]
            raise RunError(f"--prediction {prediction}: network {name} of {path} has one map: leave it out")
        model.config["prediction"] = prediction
    return model.to(memory_format=torch.channels_last)  # as in training, and faster


def network_arguments_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the arguments of a checkpoint's network, including ``network``; raise RunError if that is unknown."""
    try:
        given = release_arguments(checkpoint["release"]) if "release" in checkpoint else checkpoint["network"]
        options = {"network": DEFAULT_NETWORK} | given
    except NetworkError as error:
        raise RunError(f"{path} is {error}") from error
    if options.get("variant") == "stable" and "prediction" not in options:
        raise RunError(
            f"{path} was trained with an earlier version of variant stable: train again, or run git checkout 05f08a1"
        )
    if (name := str(options["network"])) not in NETWORKS:
        raise RunError(f"{path} holds an unknown network {brief(name)}: import its file in networks/__init__.py")
    return options


def load_fitting(model: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> list[str]:
    """Copy the weights of a trained network into a new one, as far as they fit; return lines for the log.

    A module is copied if all its tensors have the same shapes; a memory bank must also have ended its warm-up. W-LD
    starts anew, so the new network keeps its own K. Raises RunError if nothing fits.
    """
    channels = model.config["in_channels"] if "release" in checkpoint else None
    trained = build_network(checkpoint, path, channels)
    weights, own = trained.state_dict(), model.state_dict()
    modules = {name: name.rpartition(".")[0] for name in own}
    unfit = {modules[name] for name in own if name not in weights or weights[name].shape != own[name].shape}
    for name, bank in model.named_modules():  # a memory starts anew unless it has done the longer of the two warm-ups
        if isinstance(bank, PrototypeMemoryBank) and name not in unfit:
            ends = max(bank.kmeans_step, trained.get_submodule(name).kmeans_step)
            if weights[f"{name}.warmup_counter"] < ends:
                unfit.add(name)
    names = [name for name in own if modules[name] not in unfit and not name.endswith(".replaced_columns")]
    if not names:
        raise RunError(f"no weights of {path} fit this network: leave out --network and the flags of its sizes")
    model.load_state_dict({name: weights[name] for name in names}, strict=False)
    for name, block in model.named_modules():  # if the momentum copy does not fit, it starts as a copy of phi
        if isinstance(block, DMWLA) and name in unfit:
            block.phi_k.copy_(block.phi.weight.detach())
    parts: dict[str, list[str]] = {}
    for name in sorted(unfit):
        parts.setdefault("memory" if name.endswith(".bank") else name.partition(".")[0], []).append(name)
    new = [f"new {part}: {path} has none that fits ({brief(', '.join(names))})" for part, names in parts.items()]
    return [f"the weights come from {path}", *new]


def describe_data(train_set: TrainingSet, val_set: Sequence[Volume], classes: Sequence[str]) -> list[str]:
    """Return lines that identify the data of a run: all cases and classes, and facts of three training samples."""
    lines = [f"training case {name}" for name in train_set.names] + [f"{len(train_set)} training samples"]
    lines += [f"validation case {name}" for name in val_set.names] + [f"class {name}" for name in classes]
    for i in (0, len(train_set) // 2, len(train_set) - 1):
        image, label = train_set.stored(i)
        pixels = ", ".join(map(str, np.bincount(label.ravel()).tolist()))
        lines.append(f"training sample {i + 1} with mean {image.mean(dtype=float):.3g}, pixels of its classes {pixels}")
    return lines


def cases_described(checkpoint: Mapping[str, Any], kind: str) -> set[str]:
    """Return the training or validation cases of a checkpoint's run; empty for an old checkpoint."""
    lines, start = checkpoint.get("described", ()), f"{kind} case "
    return {line.removeprefix(start) for line in lines if line.startswith(start)}


def cases_seen(checkpoint: Mapping[str, Any], dataset: str) -> dict[str, list[str]]:
    """Return, for each data set, the cases on which a checkpoint's weights were trained, in its run or earlier.

    dataset: the data set of the checkpoint.
    """
    before = checkpoint.get("seen", {})
    own = {*before.get(dataset, ()), *cases_described(checkpoint, "training")}
    return before | {dataset: sorted(own)}


def refuse_other_data(path: Path, then: Sequence[str], now: Sequence[str]) -> None:
    """Raise RunError if the lines of ``describe_data`` differ between checkpoint ``path`` (then) and this run (now)."""
    for before, here in zip_longest(then, now, fillvalue="nothing"):
        if before != here:
            raise RunError(
                f"{path} was trained on other data ({before} then, {here} now): give the data and lists of that run, "
                f"or start a run from its weights with --init_from {path} and another --output_dir"
            )


@functools.cache
def provenance() -> dict[str, Any]:
    """Return the git revision (``+`` if files have changed since) and the versions of Python, CUDA and packages."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = None  # a copy without git
    return {"git": git, "versions": versions}
