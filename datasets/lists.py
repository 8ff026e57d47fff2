"""Parse the names of files and cases, read the lists of a split, find the files of a list, and divide cases into lists.

``<list_dir>/<split>.txt`` has one entry per line: a file name with its extension, or the name of a patient, volume or
slice. Such a name stands for all files that have exactly this name or continue it after ``_``: ``patient001`` stands
for ``patient001_frame01...``, but not for ``patient0010...``. ``val.txt`` may also be called ``valid.txt`` (MT-UNet).
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from datasets.errors import DataError, brief, counted
from datasets.files import file_stem, write_text
from datasets.storage import reading

PREPARED_ENDINGS = (".npy.h5", ".h5", ".npz")  # extensions of volumes and slices, longest first
_OTHER_NAMES = {"val": "valid", "valid": "val"}
_SLICE = re.compile(r"(?P<volume>.+?)_slice(?P<phase>E[DS])?_?[0-9]+")
# Matches the person in names of public data sets with several scans per person: patient001_frame01,
# case_002_volume_ED, sub-01_ses-2. Other names are not matched: a number in them may count scans or persons.
_PERSON = re.compile(r"sub-[A-Za-z0-9]+|(?:patient|case|subject)[-_]?[0-9]+(?![A-Za-z0-9])", re.IGNORECASE)
PATTERN_HELP = "regular expression that finds the patient in a case name, if a patient has several scans"


def data_name(path: str | Path) -> str:
    """Return the name of a volume or slice file without its extension."""
    name = Path(path).name
    return next((name.removesuffix(ending) for ending in PREPARED_ENDINGS if name.endswith(ending)), name)


def natural_key(name: str) -> list:
    """Return a sort key that puts slice 2 before slice 10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def is_slice(path: str | Path) -> bool:
    """Return whether a file or entry has the name of one slice of a volume."""
    return _SLICE.fullmatch(data_name(path)) is not None


def volume_name(path: str | Path) -> str:
    """Return the volume name of a file or entry: volume-4 for volume-4.npy.h5 and volume-4_slice012.npz.

    MT-UNet's case_019_sliceED_4.npz belongs to case_019_volume_ED.
    """
    found = _SLICE.fullmatch(data_name(path))
    return "_volume_".join(filter(None, found.group("volume", "phase"))) if found else data_name(path)


def is_unsafe_name(name: str) -> bool:
    """Return whether a name could point outside its folder, or begins with a dot (a hidden file)."""
    return re.search(r"[/\\\0]|\.\.|^\.", name) is not None


def has_person(name: str) -> bool:
    """Return whether the name of a volume, slice or entry begins with a person, such as patient001."""
    return _PERSON.match(volume_name(name)) is not None


def patient_of(name: str, pattern: str | None = None) -> str:
    """Return the patient of a volume, slice or entry.

    pattern: ``--patient_pattern``, a regular expression. The patient is its first group, or its whole match if it has
    no group. None: the patient of patient001_frame01 is patient001; a volume without such a name is its own patient.
    Raises DataError if the pattern is not a regular expression or finds no patient in the name.
    """
    name = volume_name(name)
    if pattern is None:
        person = _PERSON.match(name)
        return person.group() if person else name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise DataError(f"--patient_pattern {pattern}: not a regular expression ({error}); correct it") from error
    patient = found[1 if found.re.groups else 0] if found else None
    if not patient:
        raise DataError(f"{name}: --patient_pattern {pattern} finds no patient in this name; correct the pattern")
    return patient


def beginnings(name: str) -> list[str]:
    """Return the entries that may stand for a name in a list: a, a_b and a_b_c for a_b_c."""
    words = name.split("_")
    return ["_".join(words[:count]) for count in range(1, len(words) + 1)]


def list_path(list_dir: str | Path, split: str) -> Path:
    """Return the path of a split's list, which may not exist. For a validation list, try val.txt and valid.txt."""
    path = Path(list_dir) / f"{split}.txt"
    other = path.with_stem(_OTHER_NAMES.get(split, split))
    return other if other.is_file() and not path.is_file() else path


def read_list(list_dir: str | Path, split: str) -> list[str]:
    """Return the entries of a split's list in the order of its lines, without blank lines.

    Raises DataError for a list that is missing, empty or not text, an entry that contains a path, and an entry that
    occurs twice.
    """
    path = list_path(list_dir, split)
    if not path.is_file():
        raise DataError(f"{path}: no such list; give the folder that holds {split}.txt with --list_dir (see lists/)")
    with reading(path, "text file", "write one name per line"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise DataError(f"{path}: the list is empty; write one patient, volume or slice name per line")
    for entry in entries:
        if is_unsafe_name(entry):
            raise DataError(f"{path}: entry {brief(repr(entry))} has a folder, .. or a leading dot; write a name alone")
    twice = [entry for entry, count in Counter(entries).items() if count > 1]
    if twice:
        raise DataError(f"{path}: entries listed twice: {brief(', '.join(twice[:3]))}; keep one line of each")
    return entries


def files_by_name(paths: Iterable[Path], pattern: str) -> dict[str, Path]:
    """Return the files whose whole name matches ``pattern``, in natural order; keys are the pattern's first group.

    Files whose name begins with a dot are left out. Raises DataError if two files have the same key.
    """
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: natural_key(path.name)):
        found = None if path.name.startswith(".") else re.fullmatch(pattern, path.name)
        if found and path.is_file() and files.setdefault(found[1], path) != path:
            raise DataError(f"{path}: {files[found[1]]} has the same name; remove one of the two")
    return files


def select_files(
    list_dir: str | Path, split: str, root: str | Path, endings: Sequence[str] = PREPARED_ENDINGS,
    only: Sequence[str] | None = None, without: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Return the files that a split's list names, in the order of its entries; files of one entry in natural order.

    root: folder of the files; if it has a subfolder with the split's name, that is used instead (MT-UNet's layout).
    only, without: names of cases to keep or to leave out: entries, their volumes or their patients (``case0005``).
    Raises DataError for a bad list, a name that is not in the list, an entry without a file, and a missing folder.
    """
    source = list_path(list_dir, split)
    entries = _chosen(source, read_list(list_dir, split), only, without)
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; prepare the data first (prepare_data.py, data/README.md)")
    inner = (folder / name for name in (split, _OTHER_NAMES.get(split, split)))
    folder = next((path for path in inner if path.is_dir()), folder)
    files = files_by_name(folder.iterdir(), f"(.+(?:{'|'.join(map(re.escape, endings))}))")
    names = {path: {name, *beginnings(data_name(name))} for name, path in files.items()}
    return named_files(source, entries, names, f"file ({' or '.join(endings)}) in {folder}")


def named_files(source: Path, entries: Sequence[str], names: Mapping[Path, Collection[str]], what: str) -> list[Path]:
    """Return the files that the entries of a list name, in the order of the entries.

    names: maps each file, in natural order, to the entries that stand for it; what: describes a file and its folder in
    the error message. Raises DataError for an entry without a file, and for a file that two entries name.
    """
    files: dict[str, list[Path]] = {}
    for path, entries_of_path in names.items():
        for entry in entries_of_path:
            files.setdefault(entry, []).append(path)
    refuse_missing(source, f"entries have no {what}", entries, files)
    owner: dict[Path, str] = {}
    for entry in entries:
        for path in files[entry]:
            if path in owner:
                raise DataError(f"{source}: entries {owner[path]!r} and {entry!r} both name {path}; keep one of them")
            owner[path] = entry
    return list(owner)


def _chosen(source: Path, entries: list[str], only: Sequence[str] | None, without: Sequence[str]) -> list[str]:
    """Return the entries that ``only`` names (None: all) and ``without`` does not name; raises DataError."""
    names = {entry: {entry, *beginnings(volume_name(entry))} for entry in entries}
    unknown = sorted({*(only or ()), *without}.difference(*names.values()))
    if unknown:
        patients = sorted({patient_of(entry) for entry in entries}, key=natural_key)
        among = "with --val_cases, or train with --select test" if without else "with --cases"
        raise DataError(
            f"{source}: does not name {', '.join(unknown)}; it names {brief(', '.join(patients))}: choose from these "
            f"{among}"
        )
    kept = [e for e in entries if (only is None or names[e] & {*only}) and not names[e] & {*without}]
    if not kept:
        raise DataError(f"{source}: no entry is left without {', '.join(without)}; give fewer cases to --val_cases")
    return kept


def refuse_missing(where: Path, what: str, wanted: Collection[str], there: Container[str]) -> None:
    """Raise DataError with the first five missing names if something that a list names does not exist."""
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(wanted)} {what}: {brief(', '.join(missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}; prepare the missing data (prepare_data.py) or choose another "
            "--list_dir or split"
        )


def write_lists(folder: str | Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Write ``<part>.txt`` with one name per line for every part; remove the list of an empty part."""
    for part, names in parts.items():
        path = Path(folder) / f"{part}.txt"
        if names:
            write_text(path, "".join(f"{name}\n" for name in names))
        else:
            path.unlink(missing_ok=True)


def split_names(names: Iterable[str], counts: Sequence[int], seed: int = 2222) -> list[list[str]]:
    """Sort names, shuffle them once, and cut them into parts. Returns the parts, each in natural order.

    counts: number of names in each part; if there are more or fewer names in all, the parts keep these proportions.
    """
    names = sorted(set(names))
    random.Random(seed).shuffle(names)
    ends = [round(len(names) * sum(counts[: index + 1]) / sum(counts)) for index in range(len(counts))]
    return [sorted(names[start:end], key=natural_key) for start, end in zip([0, *ends], ends, strict=False)]


def is_one_line(name: str) -> bool:
    """Return whether a name has no control character, line break or undecodable byte, as lists and tables require."""
    return re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name) is None


def refuse_names(raw: str | Path, names: Collection[str], planar: bool = False) -> None:
    """Raise DataError for fewer than two cases, and for names that a list cannot hold or would confuse.

    planar: pictures, not scans. For scans an entry also stands for slices and for names that continue it after ``_``.
    """
    if len(names) < 2:
        raise DataError(f"{raw}: has {counted(len(names), 'case')}; expected 2 or more, to train on and to validate on")
    for name in names:
        other = next((start for start in beginnings(name)[:-1] if start in names), None)
        if other is not None and not planar:
            raise DataError(f"{raw}: in a list, {other} would also stand for {name}; rename one of the two cases")
        if (is_slice(name) and not planar) or is_unsafe_name(name) or name != name.strip() or not is_one_line(name):
            raise DataError(f"{raw}: a list cannot hold the case name {name!r} (slice, path, bad character); rename it")
    for stem, alike in groupby(sorted(names, key=file_stem), file_stem):
        if len(alike := [*alike]) > 1:
            raise DataError(f"{raw}: {alike[0]} and {alike[1]} would both be written as {stem}; rename one of the two")


def divide(
    names: Sequence[str], folds: int | None = None, test: int = 0, splits: Path | None = None, seed: int = 2222,
    pattern: str | None = None, left_out: Collection[str] = (), owner: Callable[[str], str] = str,
) -> list[dict[str, list[str]]]:  # fmt: skip
    """Return the lists of each fold: the names of its parts ``train``, ``val`` and, if any are held out, ``test``.

    Patients are shuffled once; ``test`` percent of them are held out, each other patient validates in one fold. folds:
    None means 5, or 2 to 4 if there are too few patients. pattern: as in ``patient_of``, applied to ``owner(name)`` of
    each case. splits: nnU-Net's ``splits_final.json`` or a folder of lists, to use instead; they may also name the
    cases in ``left_out``. Raises DataError for too few patients and for splits that name unknown cases.
    """
    if splits is not None:
        return _given(names, splits, left_out)
    patients: dict[str, list[str]] = {}
    for name in names:
        patients.setdefault(patient_of(owner(name), pattern), []).append(name)
    folds = folds or max(2, min(5, len(patients) - round(len(patients) * test / 100)))
    # The first count is the size of the test part in folds; it makes ``test`` percent of all patients.
    divided = split_names(patients, [test * folds / (100 - test), *[1] * folds], seed)
    held, *validating = ([name for patient in part for name in patients[patient]] for part in divided)
    if folds < 2 or not all(validating) or (test and not held):
        raise DataError(
            f"--folds {folds} --test {test}: do not fit {len(patients)} patients; expected 2 or more folds, with a "
            "patient in each and in the test part: change the numbers, or give --patient_pattern '.+' (each case is a "
            "patient; only crops or slices of one image stay together)"
        )
    lists = []
    for val in validating:
        train = [name for others in validating if others is not val for name in others]
        parts = {"train": train, "val": val, "test": held}
        lists.append({part: sorted(members, key=natural_key) for part, members in parts.items() if members})
    return lists


def _given(names: Sequence[str], splits: Path, left_out: Collection[str]) -> list[dict[str, list[str]]]:
    """Return the splits in nnU-Net's file or in a folder of lists, with only the cases in ``names``."""
    if splits.is_dir():
        there = [part for part in ("train", "val", "test") if list_path(splits, part).is_file()]
        lists = [{part: read_list(splits, part) for part in there}]
    else:
        with reading(splits, "splits_final.json", "correct it, or give another file or a folder of lists as --splits"):
            lists = json.loads(splits.read_text(encoding="utf-8-sig"))
            lists = [{part: list(map(str, one[part])) for part in one} for one in lists]
    for one in lists or [{}]:
        missing = {"train", "val"} - {part for part in one if one[part]}
        unknown = sorted({name for part in one.values() for name in part} - {*names, *left_out})
        if missing or unknown:
            what = f"has no {missing.pop()} list" if missing else f"names {unknown[0]}, which is not a case"
            raise DataError(f"{splits}: {what}; correct it: the cases are {brief(', '.join(names), 80)}")
    return [{part: [name for name in one[part] if name in {*names}] for part in one} for one in lists]
