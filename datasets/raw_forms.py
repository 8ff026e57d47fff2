"""Recognise the form of a folder that holds the user's own scans or pictures, with a label for each.

There are three forms: a task of the Medical Segmentation Decathlon, a raw data set of nnU-Net (version 1 or 2), and
``images`` with ``labels`` (or ``masks``) of the same file names. Only file names and ``dataset.json`` are read here.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from datasets.errors import DataError, brief
from datasets.image_files import IMAGE_ENDINGS
from datasets.lists import PREPARED_ENDINGS, files_by_name
from datasets.preparation import RawCase, refuse_twins
from datasets.preprocessing import RGB
from datasets.scan_files import FOLDER_ENDINGS, channel_files, scan_name
from datasets.storage import MAX_VALUE, reading

JSON = "dataset.json"
MAX_CLASSES = 255  # without background: labels are stored as uint8
_SCANS = tuple(ending for ending in FOLDER_ENDINGS if ending not in PREPARED_ENDINGS)
_FILE = rf"(?i)(.+?)(?:{'|'.join(map(re.escape, (*_SCANS, *IMAGE_ENDINGS)))})"  # longest endings first
_FOLDERS = (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr"))
_EXPECTED = f"expected {JSON} (Decathlon, nnU-Net), or folders images and labels (or masks) with the same file names"


@dataclass
class Raw:
    """What a folder holds according to its file names and ``dataset.json``; no other file has been read yet."""

    form: str
    cases: list[RawCase]  # each has one image file, or one for each channel
    classes: dict[int, str] | None  # class names by label value, without background; None: nothing is declared
    channels: tuple[str, ...]
    planar: bool = False  # pictures, not scans
    problems: dict[str, str] = field(default_factory=dict)  # one line for each case that cannot be used, by its name


def recognise(folder: str | Path) -> Raw:
    """Return what a folder of raw data holds. Raises DataError for a folder that has none of the known forms."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; correct --raw")
    folder = next((f for f in (folder, folder / folder.name) if (f / JSON).is_file()), folder)  # unpacked twice
    if (folder / JSON).is_file():
        raw = _declared(folder, read_json(folder / JSON))
    else:
        found = next((pair for pair in _FOLDERS if all((folder / name).is_dir() for name in pair)), None)
        if found is None:
            raise DataError(f"{folder}: {_EXPECTED}; correct --raw")
        raw = _paired(*(folder / name for name in found), f"folders {found[0]} and {found[1]}, no {JSON}")
    if not raw.cases and not raw.problems:
        raise DataError(f"{folder}: holds no image with a label ({', '.join((*_SCANS, *IMAGE_ENDINGS))}); {_EXPECTED}")
    refuse_twins(raw.cases)
    kinds = {path.name.lower().endswith(IMAGE_ENDINGS) for case in raw.cases for path in (*case.images, *case.labels)}
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds pictures and scans; put them into two data sets")
    raw.planar = True in kinds
    raw.channels = RGB if raw.planar else raw.channels
    if raw.planar and any(len(case.images) > 1 for case in raw.cases):
        raise DataError(f"{folder}: a picture has one file per channel; expected all its colours in one PNG or TIFF")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raises DataError for anything else."""
    with reading(path, "JSON file", "correct it or copy it again"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected an object with labels and channels")
    return content


def _declared(folder: Path, content: dict[str, Any]) -> Raw:
    """Return the cases, classes and channels that a ``dataset.json`` declares; raises DataError."""
    path, names = folder / JSON, content.get("channel_names", content.get("modality", {"0": "image"}))
    classes = _classes(path, content.get("labels"))
    try:
        channels = tuple(str(names[key]) for key in sorted(names, key=int))
        if not channels:
            raise ValueError("none")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{path}: its channels are {brief(names)}; expected {{"0": "T1", "1": "T2", ...}}') from error
    listed = content.get("dataset", content.get("training"))
    if not isinstance(listed, dict | list):
        raw = _paired(folder / "imagesTr", folder / "labelsTr", f"nnU-Net, version 2 ({JSON})", len(channels))
        raw.classes, raw.channels = classes, channels
        return raw
    raw = Raw(f"Medical Segmentation Decathlon ({JSON})", [], classes, channels)
    for given, entry in listed.items() if isinstance(listed, dict) else zip(repeat(None), listed):
        try:
            label, images = entry["label"], entry.get("images", [entry.get("image")])
            *images, label = (folder / name for name in (*images, label))
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f'{path}: lists {brief(entry)}; expected a case with "image" and "label"') from error
        if len(images) == 1 and not images[0].is_file():  # nnU-Net, version 1: the list leaves out _0000
            stem = scan_name(images[0])
            first = images[0].with_name(f"{stem}_0000{images[0].name[len(stem) :]}")
            if first.is_file():
                raw.form, images = f"nnU-Net, version 1 ({JSON})", channel_files(first, len(channels))
        found = re.fullmatch(_FILE, label.name)
        name = str(given or (found[1] if found else label.name))
        missing = [file for file in (*images, label) if not file.is_file()]
        if missing:
            raw.problems[name] = f"{missing[0]}: no such file, but {JSON} names it; copy it there or correct {JSON}"
        else:
            raw.cases.append(RawCase(name, tuple(images), (label,)))
    return raw


def _classes(path: Path, labels: Any) -> dict[int, str]:
    """Return the names of the label values, from the Decathlon's ``{"1": name}`` or nnU-Net's ``{name: 1}``."""
    if not isinstance(labels, dict) or not labels:
        raise DataError(f'{path}: declares no "labels"; expected {{"background": 0, "name": 1, ...}}')
    classes: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError(
                f"{path}: class {brief(key)} is a region, the union of labels {brief(value)}; regions are not "
                "supported: declare one number for each class, and store it in every voxel of the class"
            )
        given, name = (key, value) if isinstance(value, str) else (value, key)
        if name == "ignore":
            raise DataError(f"{path}: declares an ignore label, which is not supported; give its voxels a class")
        number = int(given) if str(given).isdecimal() else -1
        if not 0 <= number <= MAX_VALUE:
            raise DataError(f"{path}: class {brief(name)} has number {brief(given)}; expected 0 to {MAX_VALUE}")
        if number in classes or name in classes.values():
            raise DataError(f"{path}: declares {number} or {brief(name)} twice; correct its labels")
        classes[number] = name
    classes.pop(0, None)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise DataError(f"{path}: declares {len(classes)} classes besides background; expected 1 to {MAX_CLASSES}")
    return dict(sorted(classes.items()))


def _paired(image_folder: Path, label_folder: Path, form: str, channels: int | None = None) -> Raw:
    """Return the images of one folder with their labels in another; channels: expected number, None: any number."""
    for folder in (image_folder, label_folder):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {_EXPECTED}")
    images, labels = (files_by_name(folder.iterdir(), _FILE) for folder in (image_folder, label_folder))
    files_of: dict[str, list[tuple[int, Path]]] = {}  # by case: channel numbers and files
    for name, path in images.items():
        found = None if name in labels else re.fullmatch("(.+)_([0-9]{4})", name)
        case, channel = found.groups() if found and (channels or found[1] in labels) else (name, 0)
        files_of.setdefault(case, []).append((int(channel), path))
    expected = channels or max(map(len, files_of.values()), default=1)
    raw = Raw(form, [], None, tuple(f"channel {c}" for c in range(expected)))
    for name, numbered in files_of.items():
        numbers, files = zip(*numbered, strict=True)
        if name not in labels:
            raw.problems[name] = f"{files[0]}: has no label of this name in {label_folder}; add it or remove the image"
        elif numbers != (*range(expected),) and (channels is None or numbers != (0,)):  # one file may hold all channels
            found = ", ".join(f"{number:04d}" for number in numbers)
            raw.problems[name] = f"{files[0]}: has the channel files {found}; expected {expected}, numbered from 0000"
        else:
            raw.cases.append(RawCase(name, files, (labels[name],)))
    for name in labels.keys() - files_of.keys():
        raw.problems[name] = f"{labels[name]}: has no image of this name in {image_folder}; add it or remove the label"
    return raw
