"""Check prepared data: what each split holds, whether its files fit together, and whether they fit a checkpoint."""

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from datasets import DataError, DatasetInfo, ImageDataset, ImageFolder, SliceDataset, VolumeDataset
from datasets.errors import brief, counted, extent
from datasets.image_files import image_of
from datasets.info import VOLUME_FOLDER
from datasets.lists import beginnings, has_person, list_path, natural_key, patient_of, read_list, volume_name
from datasets.preprocessing import orientation_of
from datasets.storage import PREPARE, reading
from datasets.volumes import read_volume

logger = logging.getLogger(__name__)

Samples = SliceDataset | ImageDataset
Cases = VolumeDataset | ImageFolder
NAMELESS = "the files name no classes, so the names of %s are used: if they are wrong, train with --class_names"
UNIT = -0.05, 1.05
"""Range of intensities in prepared scans: 0 to 1, and a margin, because resampling may leave this range."""


def open_samples(info: DatasetInfo, args: Namespace, split: str, without: Sequence[str] = (), **options) -> Samples:
    """Return the slices or images of a split, for training.

    args: the folders, the number of classes and the label order of the command line; without: names in the list to
    leave out; options: ``img_size``, ``augment`` and ``seed``, and for images ``photometric``.
    """
    info.require(args.root_path)
    where = args.root_path, args.list_dir, split, args.num_classes
    if info.planar:
        return ImageDataset(info, *where, **options)
    order = info.label_order(vars(args).get("label_order"), args.num_classes)
    return SliceDataset(*where, **options, label_order=order, without=without)


def open_cases(
    info: DatasetInfo, args: Namespace, split: str, only: Sequence[str] | None = None, folder: Path | None = None
) -> Cases:
    """Return the volumes or images of a split, for validation or testing.

    args: as for ``open_samples``; only: names in the list to keep; folder: of the volumes, if not ``args.volume_path``.
    """
    if info.planar:
        return ImageFolder(info, args.root_path, args.list_dir, split, args.num_classes)
    folder = folder or args.volume_path
    info.require(folder)
    order = info.label_order(vars(args).get("label_order"), args.num_classes)
    return VolumeDataset(folder, args.list_dir, split, args.num_classes, order, only=only)


class Split:
    """What is found in the cases of a split that ``add`` reads; ``pattern`` is ``--patient_pattern``."""

    def __init__(self, data: Samples | Cases, info: DatasetInfo, pattern: str | None = None):
        self.data, self.info = data, info
        self.kind = "images" if info.planar else "slices" if isinstance(data, SliceDataset) else "volumes"
        names = data.whole_images if info.planar else data.names
        self.patients = {patient_of(name, pattern): name for name in names}  # each with one of its cases
        self.exact = info.planar or pattern is not None  # a list entry never stands for several patients
        self.grouped = self.exact or any(map(has_person, names))
        self.read = 0  # number of cases
        self.voxels = np.zeros(data.num_classes, np.int64)  # number of voxels of each class
        self.named: tuple[str, ...] = ()  # the classes, if a file names them
        self.shapes: dict[tuple[int, ...], Path] = {}  # each with the first file that has it
        self.spacings: set[tuple[float, ...]] = set()
        self.unmeasured = 0  # cases without a spacing
        self.low, self.high = np.inf, -np.inf  # smallest and largest intensity
        self.doubts: Counter[str] = Counter()  # what is probably wrong, and in how many cases

    def add(self, index: int) -> None:
        """Read and check a case. Raises DataError, also if its class names differ from those of an earlier case."""
        data, prepared = self.data, self.info.preprocessing
        file = data.files[index] if self.kind == "slices" else data.files[data.names[index]][0]
        case = data.open(index)
        low, high = float(case.image.min()), float(case.image.max())
        self.low, self.high, self.read = min(self.low, low), max(self.high, high), self.read + 1
        self.voxels += np.bincount(case.label.ravel(), minlength=len(self.voxels))
        self.shapes.setdefault(case.label.shape[1:] if self.info.planar else case.label.shape, file)
        if self.info.planar:
            return
        self.spacings |= {case.spacing} if case.spacing else set()
        self.unmeasured += case.spacing is None
        if case.class_names:
            self.named = data.class_names = case.class_names  # later files must have the same names
        expected = len(self.info.channels)
        if case.image.shape[case.label.ndim :] != ((expected,) if expected > 1 else ()):
            raise DataError(
                f"{file}: its image has shape {case.image.shape}; expected {expected} channel{'s' * (expected > 1)}: "
                "store that many, or prepare the scans with prepare_data.py custom"
            )
        if self.kind == "slices":
            return
        axes = prepared.orientation if case.affine is None else orientation_of(case.affine)
        if prepared.orientation not in (None, axes):
            raise DataError(
                f"{file}: its axes x, y, z run to {axes}; expected {prepared.orientation}, as in predict.py; {PREPARE}"
            )
        if prepared.fills_unit and UNIT[0] < low <= high < UNIT[1] and (low > 0.1 or high < 0.9):
            self.doubts["intensities do not run from 0 to 1 in each volume, but predict.py scales scans like this"] += 1
        if case.affine is None and case.image.shape[0] > 4 * min(case.image.shape[1:3]):
            self.doubts["many slices with few rows or columns: is the shape (slices, rows, columns)?"] += 1
        if case.spacing and case.spacing[0] * 4 < case.spacing[2] and case.image.shape[0] * 4 < case.image.shape[2]:
            self.doubts["few slices, and thin ones: is the spacing in the order slices, rows, columns?"] += 1
        if self.class_names == self.info.class_names:
            self.doubts.update(self.info.doubtful_places(case.label))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of the files or of the user; if neither gives any, those of the data set."""
        return self.named or tuple(self.data.class_names or ()) or self.info.names_for(len(self.voxels))

    @property
    def nameless(self) -> bool:
        """Whether the classes have the data set's names only because there are equally many of them."""
        used = not self.named and not self.data.class_names and self.class_names == self.info.class_names
        return used and self.read > 0 and not self.info.planar

    @property
    def unscaled(self) -> bool:
        """Whether intensities lie outside 0 to 1 (``UNIT``), the range that ``prepare_data.py`` writes."""
        return not self.info.planar and self.read > 0 and not UNIT[0] < self.low <= self.high < UNIT[1]

    def warnings(self, trained_on: tuple[float, float] | None = None) -> list[str]:
        """Return one line for each likely error; trained_on: intensity range of the training, None for 0 to 1."""
        doubts, (low, high) = self.doubts.copy(), trained_on or (0, 1)
        alike = not trained_on or (high - low) / 4 < self.high - self.low < (high - low) * 4
        if self.spacings and self.unmeasured:
            doubts["some files have a voxel spacing and others have none: were they prepared in two ways?"] = 1
        if self.unscaled != bool(trained_on) or not alike:
            text = "" if trained_on else " (predict.py scales scans to this and refuses networks trained on others)"
            doubts[f"intensities run from {self.low:g} to {self.high:g}; expected {low:g} to {high:g}{text}"] = 1
        if self.class_names == self.info.class_names and (self.kind != "slices" or self.read == len(self.data)):
            doubts.update(self.info.doubtful_sizes(self.voxels))
        return [doubt + (f" ({count} {self.kind})" if count > 1 else "") for doubt, count in doubts.items()]

    def print(self) -> None:
        """Print what was found."""
        owner, unit = ("image", "pixels") if self.info.planar else ("patient", "voxels")
        listed = brief(", ".join(sorted(self.patients, key=natural_key)), 80)
        cases, owners = counted(len(self.data), self.kind[:-1]), counted(len(self.patients), owner)
        print(f"{self.data.source.stem}: {cases}{f' of {owners}' * (cases != owners)}: {listed}")
        if not self.read:
            return
        axes = "slices, rows, columns" if self.kind == "volumes" else "rows, columns"
        print(f"  {'size':<20} {extent(self.shapes)} ({axes})")
        if self.spacings:
            print(f"  {'spacing':<20} {extent(self.spacings)} mm (slices, rows, columns)")
        print(f"  {'intensities':<20} {self.low:.6g} to {self.high:.6g}")
        print(f"  {'label ids':<20} {brief(', '.join(map(str, np.flatnonzero(self.voxels))), 80)}")
        for name, share in zip(("background", *self.class_names), self.voxels / self.voxels.sum(), strict=True):
            print(f"  {name:<20} {share:8.3%} of {unit}" + ("" if share else f"   warning: no {unit} of this class"))
        for doubt in self.warnings():
            print(f"  warning: {doubt}")


def quick_check(train_set: Samples, val_set: Cases, info: DatasetInfo, args: Namespace) -> DatasetInfo:
    """Check in seconds what training relies on, and return the facts of the data set as its files state them.

    No patient may be in two of the training, validation and test splits. Three cases of each of the first two are
    read. The class names are those of ``--class_names``, else of the files, else of ``info``; files that are read later
    must not have others. Logs a warning for what looks wrong. Raises DataError for the first error.

    args: arguments of the training script.
    """
    names, order = tuple(args.class_names or ()), getattr(train_set, "label_order", None)
    if names and (order or not len({*names}) == len(names) == args.num_classes - 1):
        expected = f"{args.num_classes - 1} different names, or --num_classes {len({*names}) + 1}"
        if order:
            expected = f"none, because --label_order {order.name} names them; train_acdc.py takes other organs"
        raise DataError(f"--class_names gives {', '.join(names)}; expected {expected}")
    parts = [Split(data, info, args.patient_pattern) for data in (train_set, val_set)]
    tested = patients_of_list(args, info, info.splits[-1])
    tested = [listed for listed in tested if listed[0] != val_set.source]
    names, errors = check(parts, names, tested, few=True)
    for error in errors:
        raise DataError(error)
    if not names and all(part.nameless for part in parts):
        logger.warning(NAMELESS, info.name)
    for doubt in most_classes_absent(parts):
        logger.warning("%s", doubt)
    for part in parts:
        for doubt in part.warnings():
            logger.warning("%s: %s", next(iter(part.shapes.values())), doubt)
    unscaled = [end for part in parts if part.unscaled for end in (part.low, part.high)]
    if unscaled:
        info = replace(info, preprocessing=replace(info.preprocessing, stored=(min(unscaled), max(unscaled))))
    if info.planar:
        info = replace(info, preprocessing=train_set.preprocessing)  # with the bits of its 16-bit files
    names = names or info.names_for(args.num_classes)
    train_set.class_names = val_set.class_names = names
    return replace(info, class_names=names)


def patients_of_list(args: Namespace, info: DatasetInfo, split: str) -> list[tuple[Path, dict[str, str]]]:
    """Return [(path of a split's list, {patient: one of its names in the list})], or [] if there is no such list.

    args: arguments with the folder of the lists and the patient pattern.
    """
    path = list_path(args.list_dir, split)
    entries = map(image_of if info.planar else str, read_list(args.list_dir, split) if path.is_file() else ())
    patients = {patient_of(entry, args.patient_pattern): entry for entry in entries}
    return [(path, patients)] if patients else []


def compare_with_checkpoint(cases: Cases, info: DatasetInfo, data: dict[str, Any]) -> tuple[str, ...]:
    """Compare the first case of a test with what the checkpoint says about its training; log what looks wrong.

    data: the checkpoint's ``data``. Returns the class names; files that are read later must not have others. Raises
    DataError for files that were prepared in another way or have other class names than the training files.
    """
    trained, here = data.get("preprocessing", {}), info.preprocessing.to_dict()
    for key in here.keys() & trained.keys() - {"stored", "bits"}:
        if here[key] != trained[key]:
            raise DataError(
                f"{info.folder}: its files were prepared with {key} {here[key]}; expected {trained[key]}, as in "
                "training; prepare them in the same way, or test another checkpoint"
            )
    part, names = Split(cases, info), tuple(data["class_names"])
    part.add(0)
    doubts, found = part.warnings(trained.get("stored")), ", ".join(part.named)
    if part.named not in ((), names):
        # Earlier versions stored the data set's usual names, even if the files had others.
        if names != info.class_names or {*names} & {*part.named}:
            raise DataError(
                f"{cases.source}: its files name the classes {found}; expected {', '.join(names)}, as in training: "
                "test files with these classes, or another checkpoint"
            )
        doubts.append(f"the file names its classes {found}, not {', '.join(names)} as in training; its names are used")
        names = part.named
    cases.class_names = names
    if info.planar:
        own, before = cases.preprocessing.bits or 0, trained.get("bits") or 0
        bits = max(own, before) or None
        if 0 < own < before:
            logger.info("images of 16-bit files are read with %d bits, as in training", bits)
        cases.preprocessing = replace(cases.preprocessing, bits=bits)
    for doubt in doubts:
        logger.warning("%s: %s", cases.names[0], doubt)
    return names


def check(
    parts: Sequence[Split], names: tuple[str, ...] = (), others: Sequence[tuple[Path, dict[str, str]]] = (),
    few: bool = False,
) -> tuple[tuple[str, ...], list[str]]:  # fmt: skip
    """Read the cases of every part, or three of each if ``few``. Returns (class names, errors, one line each).

    names: the class names that every file must have, if it has any; empty: those of the first file that has some.
    others: lists whose cases are not read, with their patients as in ``Split``.
    """
    patients = [*((part.data.source, part.patients) for part in parts), *others]
    errors = shared_patients(patients, any(part.exact for part in parts))
    for part in parts:
        part.data.class_names = names or None
        count = len(part.data)
        cases = sorted({0, count // 2, count - 1}) if few else range(count)
        text = f"{part.data.source.stem}, {part.kind}"
        for i in tqdm(cases, desc=text, disable=True if few else None, leave=False):
            try:
                part.add(i)
            except DataError as error:
                errors.append(str(error))
        names = names or part.named
    if not few:
        errors += [error for part in parts if part.kind == "slices" for error in _unlike_volumes(part.data)]
    return names, errors + differences(parts)


def most_classes_absent(parts: Sequence[Split]) -> list[str]:
    """Return one line if most classes have no voxel in any part.

    A user's own data set is not checked: its preparation has compared the label values with the declared classes.
    """
    if parts and parts[0].info.fold is not None:
        return []
    voxels = sum(part.voxels for part in parts)
    ids = np.flatnonzero(voxels)
    if not len(ids) or 2 * len(ids) >= len(voxels):
        return []
    return [
        f"{parts[0].data.source.parent}: {len(voxels) - len(ids)} of {len(voxels)} classes are in no label read here, "
        f"only {brief(', '.join(map(str, ids)), 60)} are: is --num_classes right, and are the ids 0, 1, 2, ...?"
    ]


def differences(parts: Sequence[Split]) -> list[str]:
    """Return one line for each way in which the slices and the volumes of a data set contradict each other."""
    errors = []
    # A spread up to 0.1 may be that of black slices alone; one up to 10 may come from scaling by a percentile.
    read = sorted((part for part in parts if part.high - part.low > 0.1), key=lambda part: part.high - part.low)
    if read and not read[0].unscaled and read[-1].unscaled and read[-1].high - read[-1].low > 10:
        first, last = (f"{part.low:g} to {part.high:g} ({part.data.source})" for part in (read[0], read[-1]))
        errors = [f"intensities run from {first} and from {last}; expected one range: prepare all splits the same way"]
    volumes = [(file, shape) for part in parts if part.kind == "volumes" for shape, file in part.shapes.items()]
    for slices in (part for part in parts if part.kind == "slices" and volumes):
        # If sizes vary, another patient's slice may have the size of two other axes of a volume by chance.
        alike = len(slices.shapes) == 1 and all(shape[1:] not in slices.shapes for _, shape in volumes)
        errors += [_other_axes(file, shape, slices.shapes, alike) for file, shape in volumes]
        for plane, file in slices.shapes.items():
            own = volumes[0][0].with_name(f"{volume_name(file)}.npy.h5")  # the volume of this slice; it may not exist
            with suppress(DataError):
                image, volume = read_volume(file, ndim=2).image, read_volume(own).image
                errors.append(_other_axes(own, volume.shape[:3], {plane: file}, True))
                turned = image.swapaxes(0, 1)  # (W, H), or (W, H, C) if there are several channels
                if any(np.array_equal(turned, z) and not np.array_equal(image, z) for z in volume):
                    errors.append(f"{own}: its rows are the columns of {file.name}; store both as (rows, columns)")
    return list(filter(None, errors))


def _unlike_volumes(data: SliceDataset) -> list[str]:
    """Return one line for each way in which slices contradict the volumes that `prepare_data.py` wrote with them."""
    folder = data.files[0].parent
    slices: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.npz"), key=lambda path: natural_key(path.name)):
        slices.setdefault(volume_name(path), []).append(path)
    volumes = {name: folder.with_name(VOLUME_FOLDER) / f"{name}.npy.h5" for name in data.names}
    there, named, errors = [name for name, path in volumes.items() if path.is_file()], (), []
    with suppress(DataError):  # reported elsewhere
        named = read_volume(data.files[0], ndim=2, labelled=False).class_names
    if not there or not named:  # in files that others prepared, a case is either slices or a volume
        return []
    for name in there:
        with suppress(DataError), reading(volumes[name], "HDF5 file"), h5py.File(volumes[name], locking=False) as file:
            if (depth := len(file["image"])) != len(slices[name]):
                errors.append(f"{volumes[name]}: has {depth} slices, but {folder} {len(slices[name])}; {PREPARE}")
    with suppress(DataError):  # reported elsewhere
        name = there[0]
        volume, single = read_volume(volumes[name]), read_volume(slices[name][len(slices[name]) // 2], ndim=2)
        same = [z for z, image in enumerate(volume.image) if np.array_equal(image, single.image)]
        turned = [single.image[::-1], single.image[:, ::-1], single.image[::-1, ::-1]]
        if not same and any(np.array_equal(image, other) for image in volume.image for other in turned):
            errors.append(f"{volumes[name]}: its rows or columns run the other way than those of its slices; {PREPARE}")
        if same and not any(np.array_equal(volume.label[z], single.label) for z in same):
            errors.append(f"{volumes[name]}: its labels differ from those of its slices; {PREPARE}")
    return errors


def _other_axes(path: Path, shape: tuple[int, ...], planes: dict[tuple[int, ...], Path], alike: bool) -> str | None:
    """Return the error of a volume whose axes are not (slices, H, W), if the sizes of slices show it.

    path, shape: of the volume; planes: the sizes (H, W) of slices, each with a file; alike: whether the slices of the
    volume should have one of these sizes.
    """
    low, high = min(map(min, planes)) / 3, max(map(max, planes)) * 3
    others = [shape[:2], shape[1::-1], shape[::2], shape[::-2]]
    sized = [low <= min(plane) and max(plane) <= high for plane in (shape[1:], *others)]
    if shape[1:] in planes or not ((alike and planes.keys() & {*others}) or any(sized) > sized[0]):
        return None
    with suppress(DataError):
        if read_volume(path, labelled=False).orientation:
            return None  # prepare_data.py wrote it: a scan may be acquired along another axis than most
    (height, width), file = next(iter(planes.items()))
    return (
        f"{path}: its shape {shape} means {shape[0]} slices of {shape[1]} rows and {shape[2]} columns, but "
        f"{file.name} has {height} rows and {width} columns; store volumes as (slices, rows, columns)"
    )


def shared_patients(splits: Sequence[tuple[Path, dict[str, str]]], exact: bool) -> list[str]:
    """Return one line for every patient in two splits. A split is (path of its list, {patient: one of its names}).

    If not ``exact``, p7 and p7_a are the same patient, because the entry p7 of a list stands for both.
    """
    parts_of = (lambda patient: [patient]) if exact else beginnings
    errors = []
    for (other, there), (source, here) in combinations(splits, 2):
        begun = {part: name for patient, name in there.items() for part in parts_of(patient)}
        for patient, name in sorted(here.items()):
            same = begun.get(patient) or next((there[part] for part in parts_of(patient) if part in there), None)
            if same:
                names = f"({name} here, {same} there)"
                errors.append(
                    f"{source}: {patient} is also in {other.name} {names}; remove it from one list, or give a "
                    "--patient_pattern ('.+' makes every case a patient; only crops or slices of one image stay "
                    "together)"
                )
    return errors
