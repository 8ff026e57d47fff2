"""Read run folders, name the method of each run, average the scores of its seeds and test which differences are chance.

All results are one pandas table with a row per run, split, case, class, convention and metric.
"""

import itertools
import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd

from datasets import DATASETS, DatasetInfo, custom
from datasets.errors import brief, counted
from utils.arguments import VARIANT_DEFAULTS, flags_of_others, training_parser
from utils.errors import RunError
from utils.metrics import FOUND, MISSED, SPURIOUS
from utils.results import NUMBERS, read_cases

logger = logging.getLogger(__name__)

# The metrics: their column, and their name in tables and figures.
NAMES = {"dice": "Dice", "hd95": "HD95", "jaccard": "Jaccard", "assd": "ASSD"}
MEAN = "mean"  # stands in the column `class` for the mean over the classes
TESTED = ("dice", "hd95")  # the metrics of the paired tests and of the tables of each class
LEAST_CASES = 6  # Wilcoxon's test of fewer differences than these cannot give p < 0.05
# Arguments in which the seeds of one method may differ. `augment_on` is in old runs only.
NOT_THE_METHOD = {
    "seed", "output_dir", "resume", "device", "n_gpu", "num_workers", "cache_gib", "eval_batch_size", "deterministic",
    "volume_path", "selected_on", "checkpoint_minutes", "checkpoint_iterations", "keep", "augment_on", "data", "fold",
}  # fmt: skip
KEYS = ["method", "convention", "class", "metric", "unit"]


@dataclass
class Run:
    """One run folder."""

    folder: Path
    info: DatasetInfo
    args: dict[str, Any]  # arguments of the training, with defaults for those that its version did not have
    data: str  # the data set, and the folder of its test cases if that is not the data set's own
    settings: dict[str, str]  # what makes the method: arguments, number of processes, checkpoint
    unusual: set[str]  # the names of those settings that are not defaults
    history: pd.DataFrame  # metrics.csv, empty without one
    results: pd.DataFrame  # a row per split, case, class, convention and metric
    method: str  # the name that the user gave, or empty until `name_methods`
    tested: str  # the checkpoint and its epoch, of each split, or "-" where an old test did not say it
    lists: set[Path]  # folders of the lists that it was tested on


@dataclass
class Comparison:
    """The methods that were tested on the same data."""

    info: DatasetInfo
    data: str  # as in `Run`, with the classes where these are not those of the data set
    split: str
    class_names: tuple[str, ...]
    methods: dict[str, list[Run]]  # the seeds of each method
    cases: pd.DataFrame  # results with `method`, only of cases on which all seeds of a method were tested

    def means(self, keys: Sequence[str]) -> pd.DataFrame:
        """Return the mean `value` by `keys`, NaN left out, and with the class "mean" the mean over the classes."""
        values = self.cases.groupby(keys, sort=False, as_index=False)["value"].mean()
        others = [key for key in keys if key != "class"]
        over_classes = values.groupby(others, sort=False, as_index=False)["value"].mean()
        return pd.concat([values, over_classes.assign(**{"class": MEAN})], ignore_index=True)

    def per_case(self) -> pd.DataFrame:
        """Return `means` of each case, over seeds."""
        return self.means([*KEYS, "case"])

    def scores(self) -> pd.DataFrame:
        """Return `mean`, `sd_over_seeds`, `sd_over_cases` (NaN for one) by `KEYS`, and facts of each method.

        A mean is over the cases of all seeds or folds, then over classes. The standard deviations divide by n - 1: that
        over seeds or folds is of the means over cases, that over cases is of `per_case`. `seeds` are those of a fold;
        `missed` and `spurious` classes are counted once for each case, as means over its runs. `chosen_on` is test if
        that of any seed is.
        """
        rows = self.means(KEYS).set_index(KEYS).rename(columns={"value": "mean"})
        rows["sd_over_seeds"] = self.means([*KEYS, "run"]).groupby(KEYS)["value"].std()
        rows["sd_over_cases"] = self.per_case().groupby(KEYS)["value"].std()
        once = self.cases.query("convention == 'strict' and metric == 'dice'")
        facts = once.groupby("method").agg(cases=("case", "nunique"), chosen_on=("selected_on", "min"))
        facts["seeds"] = once.groupby(["method", "fold"])["run"].nunique().groupby("method").max()
        runs = once.groupby(["method", "case"])["run"].transform("nunique")  # that tested the case
        for state in (MISSED, SPURIOUS):
            facts[state] = ((once["state"] == state) / runs).groupby(once["method"]).sum()
        rows = rows.reset_index().merge(facts, on="method")
        return rows.assign(dataset=self.data, split=self.split, source="measured")


def read_run(folder: str | Path, method: str = "", splits: Sequence[str] = (), volume_path: Path | None = None) -> Run:
    """Read a run folder. Raises RunError if it is none, was not tested on any of the splits, or has a damaged file.

    splits: those whose results are read; without any, all. volume_path: where the test cases are, if elsewhere.
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
            text = "%s: its results are of epoch %s, but %s is now of epoch %d: test it again"
            logger.warning(text, folder, epoch, file, newest[file])
    files = [str(checkpoint.get("file")) for checkpoint in checkpoints]
    if len({*files}) > 1 or len({*predictions}) > 1:
        logger.warning("%s: its splits were tested otherwise (%s): give one with --split", folder, _and(tested))
    # What was tested is part of the method too.
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

    checkpoints: those that were tested, as in ``summary.json``. The arguments are theirs, because the run may have been
    continued with others since.
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
    for checkpoint in checkpoints:
        saved = checkpoint.get("args") or {}
        given |= {name: value for name, value in saved.items() if name not in ("max_epochs", "max_iterations")}
    with _damaged(path):
        custom_set = "data" in given
        info = custom.info_of_run(data, given["data"], given["fold"]) if custom_set else DATASETS[data["dataset"]]
        defaults = vars(training_parser("", info).parse_args([])) | VARIANT_DEFAULTS.get(given.get("variant"), {})
    args = defaults | {name: value for name, value in given.items() if value is not None}
    return info, args, defaults, config.get("ranks", 1)


def _read_history(folder: Path, args: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, int | None]]:
    """Return ``metrics.csv``, empty without one, and the epochs of ``best.pth`` and ``last.pth`` as far as it knows."""
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
            f"{path} is damaged or not of train_<set>.py ({type(error).__name__}: {brief(error)}): copy it again"
        ) from error


def _and(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def _summary(cases: Path) -> dict[str, Any]:
    """Return the summary beside cases.csv, empty without one; that of an old test does not say what was tested."""
    try:
        return dict(json.loads(cases.with_name("summary.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def _text(name: str, value: object) -> str:
    """Return an argument as text; of a folder the last two names, because the rest differs between machines.

    The lists of all folds have one name: folds are runs of one method, like seeds.
    """
    text = "/".join(PureWindowsPath(str(value)).parts[-2:]) if name.endswith(("_path", "_dir")) else str(value)
    return re.sub(r"/fold_[0-9]+$", "", text) if name == "list_dir" else text


def name_methods(runs: Sequence[Run]) -> list[Run]:
    """Name the method of each run of one data set; return the runs that do not repeat settings and seed of another.

    A method that the user did not name is named after its network and after those settings, except defaults, in which
    it differs from others of its network.
    """
    settings = pd.DataFrame([run.settings for run in runs]).fillna("-")
    for run in runs:
        alike = settings[settings["network"] == run.settings["network"]]
        words = {name: run.settings[name] for name in alike.columns[alike.nunique() > 1] if name in run.unusual}
        text = [name if value == "True" else f"{name} {value}" for name, value in words.items()]
        run.method = run.method or ", ".join([run.settings["network"], *text])
    for name, of_method in settings.groupby([run.method for run in runs], sort=False):
        if differing := list(of_method.columns[of_method.nunique() > 1]):
            logger.warning("the runs named %s count as seeds of one method but differ in %s", name, differing)
    own = {name: [run.args.get(name) for run in runs] for name in ("seed", "fold")}
    repeats = settings.assign(method=[run.method for run in runs], **own).duplicated()
    for run in itertools.compress(runs, repeats):
        logger.warning("left out: %s repeats the settings and the seed of another run of %s", run.folder, run.method)
    return list(itertools.compress(runs, ~repeats))


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method."""
    return {name: [run for run in runs if run.method == name] for name in dict.fromkeys(run.method for run in runs)}


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Return the comparisons of runs with one name of `data`: one for each split and each set of classes."""
    comparisons, info = [], runs[0].info
    tables = [run.results.assign(method=run.method, fold=run.args.get("fold", 0)) for run in runs]
    results = pd.concat(tables, ignore_index=True)
    for (split, class_names), cases in results.groupby(["split", "classes"], sort=False):
        seeds = cases.groupby(["method", "fold"])["run"].transform("nunique")  # a case has the seeds of its fold
        shared = cases.groupby(["method", "fold", "case"])["run"].transform("nunique") == seeds
        for name, left_out in cases[~shared].groupby("method")["case"].nunique().items():
            if name not in set(cases["method"][shared]):
                raise RunError(f"the seeds of {name} have no case of {split} in common: test them on the same list")
            logger.warning("%s: not in all seeds, left out of %s: %s", name, split, counted(left_out, "case"))
        cases = cases[shared].reset_index(drop=True)
        _refuse_other_data(cases)
        _check_folds(cases)
        units = cases.groupby(["convention", "metric"])["unit"]
        cases["value"] = cases["value"].mask(units.transform("nunique") > 1)  # there is no mean of mm and voxels
        cases["unit"] = units.transform(lambda unit: " or ".join(sorted(unit.unique())))
        data = runs[0].data if class_names == info.class_names else f"{runs[0].data} ({', '.join(class_names)})"
        methods = by_method([run for run in runs if str(run.folder) in set(cases["run"])])
        comparisons.append(Comparison(info, data, split, class_names, methods, cases))
    return comparisons


def _refuse_other_data(cases: pd.DataFrame) -> None:
    """Raise RunError if a case has another unit or label in one run than in another.

    Of tests of earlier versions only the classes in a label are known.
    """
    once = cases.query("convention == 'strict' and metric == 'hd95'")
    once = once.assign(in_label=once["state"].isin([FOUND, MISSED]))
    for fact in ("unit", "in_label", "label"):
        different = once.groupby(["case", "class"])[fact].transform("nunique") > 1  # NaN, unknown, does not count
        if not different.any():
            continue
        (name, _), rows = next(iter(once[different].groupby(["case", "class"], sort=False)))
        first, second = rows.dropna(subset=fact).drop_duplicates(fact)["run"].iloc[:2]
        raise RunError(
            f"{name} has another label or unit in the test of {second} than in that of {first}: test both on the same "
            "files, or leave one of them out"
        )


def _check_folds(cases: pd.DataFrame) -> None:
    """Warn of folds of two divisions in one method, and if some folds have more seeds than others."""
    for name, of_method in cases.groupby("method"):
        folds = of_method.groupby("case")["fold"].nunique()
        if folds.nunique() > 1:
            most, least = folds.idxmax(), folds.idxmin()
            logger.warning(
                "%s: %s was tested in %d folds (%s) and %s in %d, so it counts more often: are some runs of an older "
                "division of the data?", name, most, folds[most],
                ", ".join(of_method.loc[of_method["case"] == most, "run"].unique()), least, folds[least],
            )  # fmt: skip
        seeds = of_method.groupby("fold")["run"].nunique()
        if seeds.nunique() > 1:
            text = "%s: its folds have %d to %d seeds, so the cases of some count more often in its mean"
            logger.warning(text, name, seeds.min(), seeds.max())


def paired_tests(comparison: Comparison) -> pd.DataFrame:
    """Test each pair of methods on the cases of both, on Dice and HD95 averaged over classes and seeds.

    Returns a row per convention, metric and pair: the shared cases, those left out because one method lacks them or has
    no number for them, the median of first - second, the two-sided p of Wilcoxon's signed-rank test, p_holm, corrected
    by Holm over the pairs of this convention and metric, and where p is NaN a note that says why.
    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    from scipy.stats import wilcoxon

    rows, family = [], ["convention", "metric", "unit"]
    means = comparison.per_case().query("`class` == @MEAN and metric in @TESTED")
    for key, values in means.groupby(family, sort=False):
        for first, second in itertools.combinations(comparison.methods, 2):
            pair = values[values["method"].isin([first, second])].pivot(index="case", columns="method", values="value")
            # Rounded, so that rounding errors do not order equal differences.
            differences = (pair[first] - pair[second]).dropna().round(6)
            differ, shared = differences[differences != 0], len(differences)
            p, note = np.nan, f"{len(differ)} of {shared} shared cases differ; p < 0.05 needs at least {LEAST_CASES}"
            if len(differ) >= LEAST_CASES:
                p, note = wilcoxon(differ).pvalue, ""
            rows.append([*key, first, second, shared, len(pair) - shared, differences.median(), p, note])
    columns = ["first", "second", "shared_cases", "left_out_cases", "median_difference", "p", "note"]
    tests = pd.DataFrame(rows, columns=[*family, *columns]).assign(dataset=comparison.data, split=comparison.split)
    return tests.assign(p_holm=tests.groupby(family)["p"].transform(holm))


def holm(p: pd.Series) -> pd.Series:
    """Correct p values by Holm's method: the smallest of m times m, the next times m - 1, and so on, never falling."""
    ordered = p.dropna().sort_values(kind="stable")
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a table of `cases.csv` into one row per case, class, convention and metric.

    Columns: case, class, state, selected_on, convention, metric, unit ("%", "mm", "voxels" or "pixels"), value (NaN
    where a convention leaves a class out), and classes (the names of all).
    """
    rows = table.melt(["case", "class", "state", "selected_on", "strict_unit"], NUMBERS)
    rows[["convention", "metric"]] = rows.pop("variable").str.split("_", expand=True)
    percent, unit = rows["metric"].isin(["dice", "jaccard"]), rows.pop("strict_unit")
    rows["value"] = rows["value"].where(~percent, 100 * rows["value"])
    unit = unit.mask((rows["convention"] == "transunet") & (unit == "mm"), "voxels")
    return rows.assign(unit=unit.mask(percent, "%"), classes=[tuple(table["class"].unique())] * len(rows))
