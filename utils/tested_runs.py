"""Read run folders: the settings of a run, which of its checkpoints was tested on which data, and the scores.

The results are a pandas table with one row per run, split, case, class, convention and metric.
"""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd

from datasets import DATASETS, DatasetInfo, custom
from datasets.errors import brief
from utils.arguments import VARIANT_DEFAULTS, flags_of_others, training_parser
from utils.errors import RunError
from utils.results import NUMBERS, read_cases

logger = logging.getLogger(__name__)

# Arguments that may differ between the seeds of one method. Only old runs have `augment_on`.
NOT_THE_METHOD = {
    "seed", "output_dir", "resume", "device", "n_gpu", "num_workers", "cache_gib", "eval_batch_size", "deterministic",
    "volume_path", "selected_on", "checkpoint_minutes", "checkpoint_iterations", "keep", "augment_on", "data", "fold",
}  # fmt: skip


@dataclass
class Run:
    """One run folder."""

    folder: Path
    info: DatasetInfo
    args: dict[str, Any]  # arguments of the training, with defaults for those that its version did not have
    data: str  # the data set, and the folder of its test cases if that is not the data set's own
    settings: dict[str, str]  # what defines the method: arguments, number of processes, checkpoint
    unusual: set[str]  # the names of the settings that are not defaults
    history: pd.DataFrame  # metrics.csv; empty if the file is missing
    results: pd.DataFrame  # one row per split, case, class, convention and metric
    method: str  # the name that the user gave, or empty until `comparison.name_methods`
    tested: str  # checkpoint and epoch tested on each split, or "-" if old tests did not store them
    lists: set[Path]  # folders of the lists that it was tested on


def read_run(folder: str | Path, method: str = "", splits: Sequence[str] = (), volume_path: Path | None = None) -> Run:
    """Read a run folder; raise RunError if it is not one, was not tested on any of the splits, or has a damaged file.

    splits: read only the results on these; empty: on all. volume_path: folder of the test cases, if not as recorded.
    """
    folder = Path(folder)
    paths = {path.parent.name.removeprefix("results_"): path for path in sorted(folder.glob("results_*/cases.csv"))}
    paths = {split: paths[split] for split in splits or paths if split in paths}
    summaries = {split: _summary(path) for split, path in paths.items()}
    checkpoints = [summary["checkpoint"] for summary in summaries.values() if summary.get("checkpoint")]
    info, args, defaults, ranks = _read_config(folder, checkpoints)
    history, newest = _read_history(folder, args)
    where = "root_path" if info.planar else "volume_path"
    if not paths:
        split = splits[0] if splits else info.splits[-1]
        chosen, last = folder / "best.pth", folder / "last.pth"
        checkpoint = last if last.exists() and not chosen.exists() else chosen
        flags = ["--checkpoint", checkpoint, "--split", split, f"--{where}", args[where], "--list_dir"]
        script = info.train_script.replace("train", "test", 1)
        command = f"python {script} {shlex.join(map(str, [*flags, args['list_dir']]))}"
        raise RunError(f"{folder} was not tested on {split}: test it with {command}")

    left_out = NOT_THE_METHOD | flags_of_others().get(args["network"], set())
    settings = {n: _text(n, value) for n, value in args.items() if n not in left_out and value is not None}
    tested, predictions = [], []
    for checkpoint in checkpoints:
        file, epoch, prediction = (checkpoint.get(key) for key in ("file", "epoch", "prediction"))
        prediction = prediction or settings.get("prediction")
        tested.append(f"{file}, epoch {epoch}" + (f", prediction {prediction}" if prediction else ""))
        predictions += [prediction] if prediction else []
        if newest.get(file) not in (None, epoch):
            text = "%s: its results are of epoch %s, but %s now holds epoch %d: test it again"
            logger.warning(text, folder, epoch, file, newest[file])
    files = [str(checkpoint.get("file")) for checkpoint in checkpoints]
    if len({*tested}) > 1:
        logger.warning("%s: its splits were tested differently (%s): choose one with --split", folder, _and(tested))
    # The tested checkpoint is part of the method too.
    settings |= {"checkpoint": _and(files) or "best.pth", "ranks": str(ranks)}
    settings |= {"prediction": _and(predictions)} if predictions else {}
    usual = defaults | {"checkpoint": "best.pth", "ranks": 1}
    unusual = {name for name, value in settings.items() if value != _text(name, usual.get(name))}

    folders = [args | (summary.get("data") or {}) for summary in summaries.values()]
    used = {_text(where, volume_path or of_test[where]): None for of_test in folders}
    data = info.name if [*used] == [_text(where, info.volume_path)] else f"{info.name} in {_and(used)}"
    lists = {Path(of_test["list_dir"]).resolve() for of_test in folders}
    tables = []
    for split, path in paths.items():
        table = _long(read_cases(path)).assign(split=split, run=str(folder))
        tables.append(table.assign(label=table["case"].map(summaries[split].get("labels") or {})))
    results = pd.concat(tables)
    return Run(folder, info, args, data, settings, unusual, history, results, method, _and(tested) or "-", lists)


def _read_config(
    folder: Path, checkpoints: Sequence[dict[str, Any]]
) -> tuple[DatasetInfo, dict[str, Any], dict[str, Any], int]:
    """Return the data set of a run, its arguments, their defaults, and the number of processes.

    checkpoints: the tested ones, as in ``summary.json``. Their arguments take precedence, because the run may have been
    continued with other arguments since.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder, it has no config.json: give folders that train_<set>.py wrote")
    with _damaged(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        data, given = config["data"], config["args"]
    path = folder / "config_resumed.json"
    if path.is_file():
        with _damaged(path):
            config |= json.loads(path.read_text(encoding="utf-8"))
            given |= config["args"]
    with _damaged(path):
        for checkpoint in checkpoints:
            saved = checkpoint.get("args") or {}
            given |= {name: value for name, value in saved.items() if name not in ("max_epochs", "max_iterations")}
        custom_set = "data" in given
        info = custom.info_of_run(data, given["data"], given["fold"]) if custom_set else DATASETS[data["dataset"]]
        defaults = vars(training_parser("", info).parse_args([])) | VARIANT_DEFAULTS.get(given.get("variant"), {})
    args = defaults | {name: value for name, value in given.items() if value is not None}
    return info, args, defaults, config.get("ranks", 1)


def _read_history(folder: Path, args: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, int | None]]:
    """Return ``metrics.csv`` (empty if missing), and the epochs of ``best.pth`` and ``last.pth`` according to it."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return pd.DataFrame(), {}
    with _damaged(path):
        history = pd.read_csv(path, encoding_errors="replace")
        chosen = history.reindex(columns=["epoch", "val_dice"]).dropna()
        chosen = chosen[chosen["epoch"] >= (args["select_from_epoch"] or 1)]
        best = chosen["epoch"][chosen["val_dice"].idxmax()] if len(chosen) else None
        last = history["epoch"].max() if len(history) else None
        if last and last < args["max_epochs"] and not args["max_iterations"]:
            logger.warning("%s: its training has done %d of its %d epochs", folder, last, args["max_epochs"])
    return history, {"best.pth": best, "last.pth": last}


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn the errors of a block that reads a file of a run into a RunError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is damaged or not made by train_<set>.py ({type(error).__name__}: {brief(error)}): copy it again"
        ) from error


def _and(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _summary(cases: Path) -> dict[str, Any]:
    """Return the summary next to cases.csv, empty if missing or damaged; an old one does not name the checkpoint."""
    try:
        return dict(json.loads(cases.with_name("summary.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _text(name: str, value: object) -> str:
    """Return an argument as text; for a folder, only the last two names, because the rest differs between machines.

    The fold is removed from ``list_dir``: folds are runs of one method, like seeds.
    """
    text = "/".join(PureWindowsPath(str(value)).parts[-2:]) if name.endswith(("_path", "_dir")) else str(value)
    return re.sub(r"/fold_[0-9]+$", "", text) if name == "list_dir" else text


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a table of `cases.csv` into one row per case, class, convention and metric.

    Columns: case, class, state, selected_on, convention, metric, unit ("%", "mm", "voxels" or "pixels"), value (NaN
    if a convention leaves a class out), and classes (the names of all classes).
    """
    rows = table.melt(["case", "class", "state", "selected_on", "strict_unit"], NUMBERS)
    rows[["convention", "metric"]] = rows.pop("variable").str.split("_", expand=True)
    percent, unit = rows["metric"].isin(["dice", "jaccard"]), rows.pop("strict_unit")
    rows["value"] = rows["value"].where(~percent, 100 * rows["value"])
    unit = unit.mask((rows["convention"] == "transunet") & (unit == "mm"), "voxels")
    return rows.assign(unit=unit.mask(percent, "%"), classes=[tuple(table["class"].unique())] * len(rows))
