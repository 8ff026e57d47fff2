"""The user's own data: examine and prepare them, and describe them to the scripts.

``prepare`` reads every case once to find its size, spacing, label values and intensities, and logs what it found. Then
it writes the same files as for the named data sets, ``lists/fold_<k>``, and ``dataset.json``, from which ``info_of``
makes the DatasetInfo.
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from datasets.dicom import TO_RAS
from datasets.errors import DataError, brief, counted, extent
from datasets.files import write_text
from datasets.image_files import image_of, read_classes, read_grey, read_image
from datasets.info import IMAGE_FOLDER, MASK_FOLDER, VOLUME_FOLDER, DatasetInfo
from datasets.lists import beginnings, divide, refuse_names, write_lists
from datasets.preparation import Pair, RawCase, prepare_images, prepare_volumes, read_case, remove_prepared, run_all
from datasets.preprocessing import ColourPreprocessing, Preprocessing, Scale, orientation_of, preprocessing_from_dict
from datasets.raw_forms import JSON, MAX_CLASSES, Raw, read_json, recognise
from datasets.scan import load_scan, read_scan_label
from datasets.storage import is_class_name
from datasets.volumes import Volume

logger = logging.getLogger(__name__)

# Directions of x, y and z for slices in each plane. Figures then show the patient's front or head at the top.
AXES = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
_PLANES = dict(S="axial", I="axial", A="coronal", P="coronal", L="sagittal", R="sagittal")  # by slice axis
# Percentiles, or z-scores, that become 0 and 1. nnU-Net uses 0.5 and 99.5, of the foreground of all CT scans.
PERCENTILES, DEVIATIONS = (0.5, 99.5), (-4.0, 4.0)
SAMPLES = 10_000  # largest number of foreground voxels per case from which the CT window is computed
_HOW_TO_GET = "prepare the data first: python prepare_data.py custom"


def info_of(folder: str | Path, fold: int = 0) -> DatasetInfo:
    """Return the facts of a prepared folder, with the lists of a fold; raises DataError if it is not prepared."""
    path = Path(folder) / JSON
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_how_to_get(folder)}")
    return info_from(read_json(path), folder, fold)


def _how_to_get(folder: str | Path) -> str:
    return f"{_HOW_TO_GET} --raw FOLDER --out {quote(str(folder))}"


def info_from(facts: dict[str, Any], folder: str | Path, fold: int = 0) -> DatasetInfo:
    """Return a DatasetInfo from the facts in a prepared ``dataset.json``; raises DataError if they are not valid."""
    try:
        count = int(facts["folds"])
        info = DatasetInfo(
            name=str(facts["name"]),
            class_names=tuple(map(str, facts["class_names"])),
            folder=str(folder),
            list_dir=f"{folder}/lists/fold_{fold}",
            splits=("train", "val", "test") if facts["test"] else ("train", "val"),
            preprocessing=preprocessing_from_dict(facts["preprocessing"]),
            how_to_get=_how_to_get(folder),
            train_script=f"train_custom.py --data {quote(str(folder))}" + f" --fold {fold}" * bool(fold),
            channels=tuple(map(str, facts["channels"])),
            fold=fold,
            folds=count,
            patient_pattern=facts["patient_pattern"],
        )
    except (KeyError, TypeError, ValueError) as error:
        path, reason = Path(folder) / JSON, brief(error)
        raise DataError(f"{path}: is not from a prepared folder ({reason}); {_HOW_TO_GET} --raw {folder}") from error
    if not 0 <= fold < count:
        raise DataError(f"{folder}: has no fold {fold}, only 0 to {count - 1}; choose one or prepare with more --folds")
    return info


def info_of_run(data: dict[str, Any], folder: str | Path, fold: int) -> DatasetInfo:
    """Return a DatasetInfo from the data facts that a run stores. folder, fold: the prepared data that it used."""
    facts = {"name": data["dataset"], "folds": fold + 1, "test": False, "patient_pattern": None}
    return info_from(data | facts, folder, fold)


INFO = DatasetInfo(
    name="NAME",
    class_names=("class 1",),
    folder="data/NAME",
    list_dir="data/NAME/lists/fold_0",
    splits=("train", "val"),
    how_to_get="give --data FOLDER",
    train_script="train_custom.py --data data/NAME",
    fold=0,
)
"""Placeholder for a data set that the user has not given yet."""


@dataclass
class Look:
    """The properties of one case before it is prepared."""

    size: tuple[int, ...]  # (z, y, x) as stored; (H, W) for a picture
    values: list[int]  # label values, without background
    spacing: dict[str, float] | None = None  # distance between slices in mm, for each plane
    foreground: Sequence[np.ndarray] = ()  # intensities inside the label, one array per channel


def _look(channels: int, classes: dict[int, str] | None, case: RawCase) -> Look | DataError:
    """Read a case as stored and return its properties, or the error if it is unusable. channels: 0 for a picture."""
    path = case.labels[0]
    spacing, foreground = None, []
    try:
        if channels:
            stored = load_scan(case.images, channels)
            affine = TO_RAS if stored.affine is None else stored.affine
            label = read_scan_label(path, Volume(case.name, stored.channels[0], affine=affine))
            if stored.affine is not None:
                sides = np.linalg.norm(affine[:3, :3], axis=0).tolist()
                spacing = {_PLANES[letter]: side for letter, side in zip(orientation_of(affine), sides, strict=True)}
            inside = np.flatnonzero(label)
            inside = np.random.default_rng(0).choice(inside, min(len(inside), SAMPLES), replace=False)
            foreground = [np.asarray(one.flat[inside], np.float32) for one in stored.channels]
        else:
            label = _read_values(path, read_image(case.images[0], 16).shape[:2])
        values = [value for value in np.unique(label).tolist() if value]
        unknown = [value for value in values if classes is not None and value not in classes]
        if unknown:
            declared = brief(", ".join(f"{value} {name}" for value, name in classes.items()), 120)
            raise DataError(
                f"{path}: has label values {brief(', '.join(map(str, unknown)), 60)}, but {JSON} declares {declared}; "
                "declare the values there, or correct the file"
            )
    except DataError as error:
        return error
    return Look(label.shape, values, spacing, foreground)


def prepare(
    raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, axis: str | None = None,
    normalize: str | None = None, window: Sequence[float] | None = None, class_names: Sequence[str] | None = None,
    folds: int | None = None, test: int = 0, splits: Path | None = None, seed: int = 2222,
    patient_pattern: str | None = None, skip_bad: bool = False,
) -> list[str]:  # fmt: skip
    """Prepare data in one of the forms of ``recognise`` and return the names of the cases.

    axis: a key of AXES; None: across the coarsest spacing. normalize: ``percentiles`` or ``zscore`` of each scan; None:
    a window for CT, percentiles for other channels. window: intensities that become 0 and 1. class_names: names of the
    label values in ascending order; None: as declared, else class 1, class 2, ... folds, test, splits, seed,
    patient_pattern: as in ``divide``. skip_bad: leave out the cases that cannot be used. jobs, overwrite: as in
    ``prepare_volumes``. Raises DataError for missing or unusable raw data, before anything is written.
    """
    if window is not None and not -np.inf < window[0] < window[1] < np.inf:
        raise DataError(f"--window {window[0]:g} {window[1]:g}: expected two finite intensities, the lower one first")
    if splits is not None and (folds, test, seed) != (None, 0, 2222):
        raise DataError(f"--splits {splits} already divides the cases: leave --folds, --test and --seed out")
    out, found = Path(out), recognise(raw)
    if out.resolve() == Path(raw).resolve():
        raise DataError(f"{out}: this is the raw folder, whose {JSON} would be overwritten; give another --out")
    if found.planar and (axis or normalize or window):
        raise DataError(f"{raw}: holds pictures, but --axis, --normalize and --window are for scans; leave them out")
    channels = 0 if found.planar else len(found.channels)
    looks = run_all(partial(_look, channels, found.classes), found.cases, "cases read", jobs)
    problems = found.problems | {name: str(look) for name, look in looks.items() if isinstance(look, DataError)}
    looks = {name: look for name, look in looks.items() if isinstance(look, Look)}
    cases = [case for case in found.cases if case.name in looks]
    _say(found, looks, problems)
    if problems and (not skip_bad or not cases):
        remedy = "leave all of them out with --skip_bad" if cases else "correct all of them"
        more = f" (more unusable cases, listed above: {len(problems) - 1}; {remedy})" if len(problems) > 1 else ""
        raise DataError(f"{next(iter(problems.values()))}{more}")
    refuse_names(raw, looks, found.planar)
    values, names = _classes(raw, found, looks, class_names)
    owner = str
    if found.planar:  # keep crops of one image in one list; without a pattern also its copies (100 and 100_flip)
        owner = image_of if patient_pattern else partial(_original, looks)
    lists = divide(list(looks), folds, test, splits, seed, patient_pattern, problems, owner)
    if unused := looks.keys() - {name for parts in lists for part in parts.values() for name in part}:
        logger.warning("%s does not name %s: prepared, but in no list", splits, brief(", ".join(sorted(unused)), 80))
    tested = {name for part in lists for name in part.get("test", ())}
    preprocessing = ColourPreprocessing()
    if not found.planar:
        used = [look for name, look in looks.items() if name not in tested]
        preprocessing = _preprocessing(found.channels, list(looks.values()), used, axis, normalize, window)
    logger.info("prepared    %s", preprocessing.described("--img_size"))
    sizes = ", ".join(f"{len(lists[0][part])} {part}" for part in lists[0])
    logger.info("splits      %s, the first: %s", counted(len(lists), "fold"), sizes)
    facts = {
        "name": out.resolve().name, "class_names": names, "channels": found.channels, "planar": found.planar,
        "preprocessing": preprocessing.to_dict(), "label_values": values, "folds": len(lists), "test": bool(tested),
        "seed": seed, "patient_pattern": patient_pattern, "raw": found.form, "source": str(Path(raw).resolve()),
    }  # fmt: skip
    _write_facts(out, facts, overwrite)
    folders = {out / "lists" / f"fold_{fold}": parts for fold, parts in enumerate(lists)}
    # There may have been more folds. Lists of other names are the user's.
    for folder in {path.parent for path in out.glob("lists/fold_*/train.txt")} | folders.keys():
        write_lists(folder, {"train": [], "val": [], "test": [], **folders.get(folder, {})})
    if found.planar:
        prepare_images(partial(_read_picture, values), cases, raw, out, jobs, overwrite, only=True)
    else:
        read = partial(read_case, info_from(facts, out), relabel=partial(_indices, values))
        prepare_volumes(read, cases, out, jobs, overwrite, only=True)
    for problem in problems.values():
        logger.warning("left out: %s", problem)
    return list(looks)


def _original(names: Collection[str], name: str) -> str:
    """Return the shortest beginning of a picture's name that is a name too (100 of 100_flip), else its image's name."""
    image = image_of(name)
    return next((start for start in beginnings(image) if start in names), image)


def _read_picture(values: Sequence[int], case: RawCase, bits: int | None) -> Pair:
    image, path = read_image(case.images[0], bits), case.labels[0]
    return image, _indices(values, path, _read_values(path, image.shape[:2]))


def _read_values(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return the values of a picture's mask, (H, W). A JPEG blurs them, so only one class is read, white on black."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        high = int(read_grey(path, shape).max())
        if 0 < high < 240:  # possibly one of several classes; another one is white
            raise DataError(f"{path}: its brightest grey is {high}; expected 255 in a JPEG: save the masks as PNG")
        return 255 * read_classes(path, shape, (0, 255))
    return read_grey(path, shape, indices=True)


def _indices(values: Sequence[int], _: Path, label: np.ndarray) -> np.ndarray:
    """Return a label as class indices, uint8: ``values[0]`` becomes 1, ``values[1]`` becomes 2, and so on."""
    table = np.zeros(max(values) + 1, np.uint8)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table[label]


def _say(found: Raw, looks: dict[str, Look], problems: dict[str, str]) -> None:
    """Log what was found, before anything is written."""
    logger.info("form        %s, %s", found.form, "pictures" if found.planar else "scans")
    logger.info("cases       %d: %s", len(looks), brief(", ".join(looks), 80))
    logger.info("channels    %d: %s", len(found.channels), ", ".join(found.channels))
    named = [f"{value} {name}" for value, name in (found.classes or {}).items()]
    values = sorted({value for look in looks.values() for value in look.values})
    logger.info("classes     %s", brief(", ".join(named), 200) or f"not declared; label values {brief(values, 80)}")
    if looks:
        sizes = [look.size for look in looks.values()]
        axes = "rows, columns" if found.planar else "slices, rows, columns as stored"
        logger.info("size        %s (%s)", extent(sizes), axes)
    spacings = _spacings(list(looks.values()))
    if spacings:
        logger.info("spacing     %s", ", ".join(f"{name} {mm:.3g} mm" for name, mm in spacings.items()))
    for problem in problems.values():
        logger.warning("cannot be used: %s", problem)


def _classes(
    raw: str | Path, found: Raw, looks: dict[str, Look], class_names: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """Return the label values of the classes in ascending order, and the names of the classes."""
    if found.classes is not None:
        values, names = list(found.classes), list(found.classes.values())
    else:
        values = sorted({value for look in looks.values() for value in look.values})
        names = [f"class {index}" for index in range(1, len(values) + 1)]
    declared = found.classes is not None or class_names
    objects = not declared and len(values) > 16 and max(values) > min(4 * len(values), MAX_CLASSES)
    if not values or len(values) > MAX_CLASSES or objects:
        raise DataError(
            f"{raw}: its labels hold {len(values)} values, {brief(values, 60)}; expected 1 to {MAX_CLASSES} classes: "
            "store class indices 1, 2, ... without lossy compression, not numbered objects, or name every value with "
            "--class_names"
        )
    if len(values) > 1 and {*values} <= {1, 255, 65535} and not declared:
        raise DataError(
            f"{raw}: its labels hold {' and '.join(map(str, values))}, which often mean the same class; store 1 for it "
            "in all files, or name different classes with --class_names"
        )
    if class_names and not len({*class_names}) == len(class_names) == len(values):
        raise DataError(f"--class_names: {counted(len(class_names), 'name')}; expected {len(values)} different ones")
    names = list(class_names or names)
    if not all(map(is_class_name, names)):
        what = f"its classes are called {brief(names, 200)}; expected names of 1 to 100 letters"
        raise DataError(f"{raw}: {what}: give other names with --class_names, or in {JSON}")
    return values, names


def _spacings(looks: Sequence[Look]) -> dict[str, float]:
    """Return the median slice distance in mm for each plane, over cases with a known spacing; {} if there is none."""
    known = [look.spacing for look in looks if look.spacing]
    return {name: float(np.median([spacing[name] for spacing in known])) for name in AXES} if known else {}


def _preprocessing(
    channels: Sequence[str], looks: Sequence[Look], used: Sequence[Look], axis: str | None, normalize: str | None,
    window: Sequence[float] | None,
) -> Preprocessing:  # fmt: skip
    """Return the preprocessing of scans. looks: all cases; used: the cases from which a CT window may be computed."""
    spacings = _spacings(looks) or dict.fromkeys(AXES, 1.0)
    coarsest = next(name for name in AXES if spacings[name] > 0.99 * max(spacings.values()))  # axial if all are alike
    scales = []
    for number, channel in enumerate(channels):
        if window is not None:
            scale = Scale("window", *window)
        elif normalize == "zscore":
            scale = Scale("deviations", *DEVIATIONS)
        elif normalize == "percentiles" or channel.strip().upper() != "CT":
            scale = Scale("percentiles", *PERCENTILES)
        else:
            if not used:
                raise DataError(f"channel {channel}: every case is a test case in some fold; give --window LOW HIGH")
            inside = np.concatenate([look.foreground[number] for look in used])
            low, high = np.percentile(inside, PERCENTILES) if len(inside) else (0, 0)
            if not low < high:
                raise DataError(f"channel {channel}: too few different intensities in labels; give --window LOW HIGH")
            scale = Scale("window", round(float(low), 3), round(float(high), 3))
        scales.append(scale)
    orientation = AXES[axis or coarsest]
    if len(scales) == 1 and scales[0].kind == "window":
        return Preprocessing(orientation, (scales[0].low, scales[0].high))
    return Preprocessing(orientation, scales=tuple(scales))


def _write_facts(out: Path, facts: dict[str, Any], overwrite: bool) -> None:
    """Write ``dataset.json``; overwrite: remove all cases first. Raises DataError if ``out`` holds other data."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    before, now = read_json(out / JSON) if (out / JSON).is_file() else {}, json.loads(text)
    if before and not {"label_values", "preprocessing"} <= before.keys():
        raise DataError(f"{out}: its {JSON} is not from a prepared folder; give another --out")
    if before and overwrite:  # no old file stays beside the new facts, even after an interruption
        remove_prepared(out)
    elif before:
        # Earlier versions did not write the source. If it was moved, its old path may now be a link to it.
        before["source"] = str(Path(before.get("source", now["source"])).resolve())
        for key in ("source", "class_names", "channels", "planar", "preprocessing", "label_values"):
            if before.get(key) != now[key]:
                moved = "if the raw folder has moved, link its old path to it; otherwise " if key == "source" else ""
                raise DataError(
                    f"{out}: was prepared with {key} {brief(before.get(key), 100)}, not {brief(now[key], 100)}; "
                    f"{moved}prepare all cases again with --overwrite, or give another --out"
                )
    elif any(folder.is_dir() for folder in (out / VOLUME_FOLDER, out / IMAGE_FOLDER, out / MASK_FOLDER)):
        raise DataError(f"{out}: holds files of another preparation, but no {JSON}; give another --out")
    write_text(out / JSON, text)
