"""Lists of a split and the files that they name.

``<list_dir>/<split>.txt`` has one entry a line. An entry is a file name with its ending, or a name without one: a
patient, a volume or a slice, which stands for every file of that name or with ``_`` after it (``patient001`` for
``patient001_frame01...``, never for ``patient0010...``). ``val.txt`` may also be called ``valid.txt`` (MT-UNet).
"""

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path

from datasets.errors import DataError, brief
from datasets.files import atomic_write

MAX_LIST_BYTES = 2**24
"""Longest list that is read: some hundred thousand names."""

ENDINGS = (".npy.h5", ".h5", ".npz")
"""Endings of the files that are data, longest first."""

_LONGEST_NAME = 255  # bytes, of a file in the usual file systems
_OTHER_NAMES = {"val": "valid", "valid": "val"}


def data_name(path: str | Path) -> str:
    """Return a data file's name without its ending."""
    name = Path(path).name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def natural_key(name: str) -> list:
    """Return a sort key by which slice 2 comes before slice 10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def patient_of(name: str) -> str:
    """Return the patient of a file or entry, its first word with a number: patient001, case_002, case0005."""
    found = re.match(r"[A-Za-z]+_?[0-9]+", name)
    return found.group() if found else data_name(name)


def list_path(list_dir: str | Path, split: str) -> Path:
    """Return the path of a split's list, under either name of a validation list; it need not exist."""
    path = Path(list_dir) / f"{split}.txt"
    other = path.with_stem(_OTHER_NAMES.get(split, split))
    return other if other.is_file() and not path.is_file() else path


def read_list(list_dir: str | Path, split: str) -> list[str]:
    """Return the entries of a split's list, in its order, without blank lines.

    Raises DataError for a list that is missing, empty or not text, an entry with a path in it, and an entry that
    stands there twice.
    """
    path = list_path(list_dir, split)
    if not path.is_file():
        raise DataError(f"{path}: no such list; give the folder that holds {split}.txt with --list_dir (see lists/)")
    if path.stat().st_size > MAX_LIST_BYTES:
        raise DataError(f"{path}: {path.stat().st_size} bytes, too long for a list; one name a line was expected")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error.reason}); one name a line was expected") from error
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise DataError(f"{path}: the list is empty; write one patient, volume or slice name a line")
    for entry in entries:
        if re.search(r"[/\\\0]|\.\.|^\.", entry):
            raise DataError(
                f"{path}: entry {brief(repr(entry))} has a path in it; write the name alone, without folders"
            )
        if len(entry.encode()) > _LONGEST_NAME:
            raise DataError(f"{path}: entry {brief(repr(entry))} is too long for a file's name; write one name a line")
    twice = next((entry for entry, count in Counter(entries).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: entry {twice!r} stands there twice; remove one of them")
    return entries


def select_entries(
    list_dir: str | Path, split: str, only: Sequence[str] | None = None, without: Sequence[str] = ()
) -> list[str]:
    """Return the entries of a split's list, of some patients only, or without some.

    only, without: patients (``case0005``); an entry is of the patient that its name begins with. Raises DataError as
    ``read_list`` does, for a patient whom the list does not name, and where no entry is left.
    """
    entries, source = read_list(list_dir, split), list_path(list_dir, split)
    patients = {patient_of(entry) for entry in entries}
    unknown = [name for name in (*(only or ()), *without) if name not in patients]
    if unknown:
        raise DataError(
            f"{source}: does not name {', '.join(unknown)}; it has {brief(', '.join(sorted(patients)))}: choose among "
            "these (--val_cases to validate in training, --cases to test), or train with --select test"
        )
    chosen = [
        entry for entry in entries if (only is None or patient_of(entry) in only) and patient_of(entry) not in without
    ]
    if not chosen:
        raise DataError(
            f"{source}: no entry is left without {', '.join(without)}; hold out fewer (--val_cases, --select)"
        )
    return chosen


def select_files(
    list_dir: str | Path,
    split: str,
    root: str | Path,
    endings: Sequence[str] = ENDINGS,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> list[Path]:
    """Return the files that a split's list names, entry by entry, those of one entry in natural order.

    root: their folder; a folder of the split's name in it is used in its place (MT-UNet's layout). only, without:
    patients, as for ``select_entries``. Raises DataError as that does, for a folder that is missing, entries without
    a file, and a file that two entries name.
    """
    entries, source = select_entries(list_dir, split, only, without), list_path(list_dir, split)
    folder = _data_folder(Path(root), split)
    files_of = _files_by_entry(
        path for path in folder.iterdir() if path.name.endswith(tuple(endings)) and not path.name.startswith(".")
    )
    refuse_missing(source, f"entries have no file ({' or '.join(endings)}) in {folder}", entries, files_of)
    owner: dict[Path, str] = {}
    for entry in entries:
        for path in sorted(files_of[entry], key=lambda path: natural_key(path.name)):
            if path in owner:
                raise DataError(f"{source}: entries {owner[path]!r} and {entry!r} both name {path}; keep one of them")
            owner[path] = entry
    return list(owner)


def refuse_missing(where: Path, what: str, wanted: Collection[str], there: Container[str]) -> None:
    """Raise DataError, naming the first few, where something that a list wants is not there."""
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(wanted)} {what}: {brief(', '.join(missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}; prepare that data (prepare_data.py) or choose another --list_dir "
            "or split"
        )


def write_lists(folder: str | Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Write ``<part>.txt`` with one name a line for every part that has a name; a list of an empty part goes."""
    for part, names in parts.items():
        path = Path(folder) / f"{part}.txt"
        if not names:
            path.unlink(missing_ok=True)
            continue
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _data_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; prepare the data first (prepare_data.py, data/README.md)")
    inner = (root / name for name in (split, _OTHER_NAMES.get(split, split)))
    return next((folder for folder in inner if folder.is_dir()), root)


def _files_by_entry(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Return every entry that could name one of the files, with the files it names."""
    files_of: dict[str, list[Path]] = {}
    for path in paths:
        words = data_name(path).split("_")
        for entry in {path.name, *("_".join(words[:count]) for count in range(1, len(words) + 1))}:
            files_of.setdefault(entry, []).append(path)
    return files_of
