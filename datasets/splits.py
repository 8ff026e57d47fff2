"""Divide the cases of a data set into those that train, validate and test: by chance over patients, or as given."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from datasets.errors import DataError, brief, counted
from datasets.lists import beginnings, has_path, is_slice, list_path, natural_key, patient_of, read_list
from datasets.preparation import split_names
from datasets.storage import reading


def refuse_names(raw: str | Path, names: Collection[str]) -> None:
    """Raise DataError for fewer than two cases, and for names by which lists could not tell files apart."""
    if len(names) < 2:
        raise DataError(f"{raw}: has {counted(len(names), 'case')}; expected 2 or more, to train and to validate on")
    for name in names:
        other = next((start for start in beginnings(name)[:-1] if start in names), None)
        if other is not None:
            raise DataError(f"{raw}: in lists, {other} also means {name}; rename one of the two cases")
        if is_slice(name) or has_path(name) or name != name.strip():
            raise DataError(f"{raw}: a case is called {name!r}, which lists read otherwise; rename it")


def divide(
    names: Sequence[str], folds: int | None = None, test: int = 0, splits: Path | None = None, seed: int = 2222,
    pattern: str | None = None, left_out: Sequence[str] = (),
) -> list[dict[str, list[str]]]:  # fmt: skip
    """Return for each fold the names that train and validate, and those that test where ``test`` percent are held out.

    Patients, of which ``pattern`` finds the name, are shuffled once. Each validates in one of ``folds`` folds, by
    default 5 or as many as there are patients. splits: a ``splits_final.json`` of nnU-Net, or a folder of lists, in
    their place; it may name cases that were ``left_out``. Raises DataError for splits that name other cases.
    """
    if splits is not None:
        return _given(names, splits, left_out)
    patients: dict[str, list[str]] = {}
    for name in names:
        patients.setdefault(patient_of(name, pattern), []).append(name)
    folds = folds or max(2, min(5, len(patients) - bool(test)))
    held, *validating = split_names(patients, [test * folds / (100 - test), *[1] * folds], seed)
    if folds < 2 or not all(validating) or (test and not held):
        raise DataError(
            f"--folds {folds} --test {test}: too few patients ({len(patients)}), or --folds 1; expected a patient or "
            "more in each fold and in the test part"
        )
    lists = []
    for owners in validating:
        train = [patient for others in validating if others is not owners for patient in others]
        parts = {"train": train, "val": owners} | ({"test": held} if held else {})
        named = {part: [name for owner in members for name in patients[owner]] for part, members in parts.items()}
        lists.append({part: sorted(members, key=natural_key) for part, members in named.items()})
    return lists


def _given(names: Sequence[str], splits: Path, left_out: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return the splits of nnU-Net's file, or of a folder of lists."""
    if splits.is_dir():
        there = [part for part in ("train", "val", "test") if list_path(splits, part).is_file()]
        lists = [{part: read_list(splits, part) for part in there}]
    else:
        with reading(splits, "splits_final.json", "correct it, or give another or a folder of lists as --splits"):
            lists = json.loads(splits.read_text(encoding="utf-8-sig"))
            lists = [{part: list(map(str, one[part])) for part in one} for one in lists]
    for one in lists:
        missing = {"train", "val"} - {part for part in one if one[part]}
        unknown = sorted({name for part in one.values() for name in part} - {*names, *left_out})
        if missing or unknown:
            what = f"has no {missing.pop()} list" if missing else f"names {unknown[0]}, which is not a case"
            raise DataError(f"{splits}: {what}; the cases are {brief(', '.join(names), 80)}")
    if not lists:
        raise DataError(f"{splits}: holds no split; expected one or more, with train and val")
    return [{part: [name for name in one[part] if name in {*names}] for part in one} for one in lists]
