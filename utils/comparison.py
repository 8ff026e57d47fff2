"""Read run folders, put the seeds of a method together, average their scores and test which differences are chance."""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets import DATASETS
from utils.arguments import VARIANT_DEFAULTS, flags_of_others, training_parser
from utils.errors import RunError
from utils.results import NUMBERS, read_cases

logger = logging.getLogger(__name__)

NAMES = {"dice": "Dice", "hd95": "HD95", "jaccard": "Jaccard", "assd": "ASSD"}
"""The metrics: their column, and their name in tables and figures."""
MEAN = "mean"
"""Stands in the column `class` for the mean over the classes."""
TESTED = ("dice", "hd95")
LEAST_CASES = 6
"""Wilcoxon's test of fewer differences than these cannot give p < 0.05."""
NOT_THE_METHOD = {
    "seed", "output_dir", "resume", "device", "n_gpu", "num_workers", "cache_gib", "eval_batch_size", "deterministic",
    "volume_path", "selected_on", "checkpoint_minutes", "checkpoint_iterations", "keep", "augment_on",
}  # fmt: skip
"""Arguments in which the seeds of one method may differ: where and when a run took place, and what follows from others.
`augment_on` is in old runs only."""


@dataclass(frozen=True)
class Run:
    """One run folder: arguments of the training, `metrics.csv`, and the results on each split."""

    folder: Path
    args: Mapping[str, Any]
    dataset: str
    history: pd.DataFrame
    results: Mapping[str, pd.DataFrame]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the arguments that make the method, with defaults for those that the run's version did not have."""
        args = _defaults(self.dataset) | VARIANT_DEFAULTS.get(self.args.get("variant"), {}) | self.args
        left_out = NOT_THE_METHOD | flags_of_others().get(args["network"], set())
        known = {name: str(value) if isinstance(value, Path) else value for name, value in args.items()}
        return {name: value for name, value in known.items() if name not in left_out and value is not None}

    @property
    def checkpoint(self) -> Path:
        """Return the checkpoint that was tested."""
        return self.folder / "best.pth"


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed only, or to which the user gave one name."""

    name: str
    runs: tuple[Run, ...]

    @property
    def dataset(self) -> str:
        return self.runs[0].dataset


@dataclass(frozen=True, eq=False)
class Comparison:
    """The methods that were tested on one split of one data set with the same classes.

    cases: the results of every run, with the columns `method` and `run` (0, 1, ... of the method); only those
    cases on which all runs of a method were tested.
    """

    title: str
    dataset: str
    split: str
    class_names: tuple[str, ...]
    methods: Mapping[str, Method]
    cases: pd.DataFrame

    def per_case(self) -> pd.DataFrame:
        """Return `value` by method, convention, class, metric and case, averaged over seeds.

        NaN, where a convention leaves a class out, is not averaged. The class "mean" is the mean over the classes.
        """
        return _with_mean(self.cases.groupby([*_KEYS, "case"], sort=False, as_index=False)["value"].mean())

    def scores(self) -> pd.DataFrame:
        """Return `mean`, `sd_over_seeds` and `sd_over_cases` by method, convention, class and metric, and the `unit`.

        A mean is over cases, then over classes, then over seeds. The standard deviations divide by n - 1: that over
        seeds is of the means over cases, that over cases is of `per_case`. Each is NaN for n = 1.
        """
        per_seed = _with_mean(self.cases.groupby([*_KEYS, "run"], sort=False, as_index=False)["value"].mean())
        seeds, cases = (frame.groupby(_KEYS, sort=False)["value"] for frame in (per_seed, self.per_case()))
        frame = {"mean": seeds.mean(), "sd_over_seeds": seeds.std(), "sd_over_cases": cases.std()}
        return pd.DataFrame(frame).reset_index().merge(self.units(), on=["convention", "metric"])

    def units(self) -> pd.DataFrame:
        """Return the `unit` by convention and metric; "mm or voxels" if only some files have a voxel spacing."""
        units = self.cases.groupby(["convention", "metric"], sort=False)["unit"]
        return units.agg(lambda values: " or ".join(sorted(set(values)))).reset_index()


_KEYS = ["method", "convention", "class", "metric"]


def read_runs(given: Sequence[str], output_dir: Path) -> list[tuple[str | None, Run]]:
    """Read run folders, each given as FOLDER or NAME=FOLDER; return them with their names.

    What is not a run folder, or is damaged, is left out with a warning. `output_dir`, which a pattern such as `runs/*`
    also matches, is left out without one. Raises RunError if no run is left.
    """
    runs: list[tuple[str | None, Run]] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = "", text
        elif not (name.strip() and folder):
            raise RunError(f"{text}: expected FOLDER or NAME=FOLDER, with a name and a folder")
        if Path(folder).resolve() == output_dir.resolve():
            continue
        try:
            runs.append((name.strip() or None, read_run(folder)))
        except RunError as error:
            logger.warning("left out: %s", error)
    if not runs:
        raise RunError(f"no run folder in {' '.join(given)}: give folders that train_<set>.py wrote")
    return runs


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises RunError if no training script wrote it, or if a file in it is damaged."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder, it has no config.json: give folders that train_<set>.py wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        args, dataset = dict(config["args"]), config["data"]["dataset"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from error
    if dataset not in DATASETS:
        raise RunError(f"{path}: unknown data set {dataset!r}, expected one of {', '.join(DATASETS)}")
    history, results = pd.DataFrame(), {}
    if (folder / "metrics.csv").is_file():
        try:
            history = pd.read_csv(folder / "metrics.csv", encoding_errors="replace")
        except ValueError as error:  # what pandas raises for a damaged file
            raise RunError(f"{folder}/metrics.csv is damaged ({error}): copy it again") from error
    for path in sorted(folder.glob("results_*/cases.csv")):
        results[path.parent.name.removeprefix("results_")] = _scores(read_cases(path))
    return Run(folder, args, dataset, history, results)


def drop_untested(
    runs: Sequence[tuple[str | None, Run]], splits: Sequence[str] | None = None
) -> list[tuple[str | None, Run]]:
    """Return the runs that have results on at least one split.

    splits: those to compare on; None for all on which any run of the data set was tested. Where a run has no results, a
    warning gives the command that tests it. Raises RunError if no run is left.
    """
    kept, commands = [], []
    for name, run in runs:
        tested = dict.fromkeys(split for _, other in runs if other.dataset == run.dataset for split in other.results)
        wanted = splits or list(tested) or [DATASETS[run.dataset].splits[-1]]
        if any(split in run.results for split in wanted):
            kept.append((name, run))
        for split in [split for split in wanted if split not in run.results]:
            script = f"test_{run.dataset}.py"
            commands.append(shlex.join(["python", script, "--checkpoint", str(run.checkpoint), "--split", split]))
            logger.warning("%s was not tested on %s; test it with: %s", run.folder, split, commands[-1])
    if not kept:
        raise RunError(f"none of the {len(runs)} runs was tested on {', '.join(wanted)}; test it with: {commands[0]}")
    return kept


def group_runs(runs: Sequence[tuple[str | None, Run]]) -> list[Method]:
    """Put the seeds of each method together; methods of one data set follow each other.

    Runs of one name are one method. A run without a name belongs to the named method that has its settings, or else to
    a method named after its network and after those settings, except defaults, in which it differs from others of its
    network. A second run of the same settings and seed is left out with a warning.
    """
    by_dataset: dict[str, list[tuple[str | None, Run]]] = {}
    for name, run in runs:
        by_dataset.setdefault(run.dataset, []).append((name, run))
    return [method for of_set in by_dataset.values() for method in _methods(of_set)]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that are not alike in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)]


def compare(methods: Sequence[Method], splits: Sequence[str] | None = None) -> list[Comparison]:
    """Return one comparison per data set, split and choice of classes.

    splits: those to compare on; None for all on which any run was tested. Raises RunError if the runs of one method
    have different classes, or no case in common.
    """
    comparisons = []
    for dataset in dict.fromkeys(method.dataset for method in methods):
        of_set = [method for method in methods if method.dataset == dataset]
        for split in splits or dict.fromkeys(s for method in of_set for run in method.runs for s in run.results):
            by_classes: dict[tuple[str, ...], list[Method]] = {}
            for method in of_set:
                if runs := tuple(run for run in method.runs if split in run.results):
                    classes = tuple(runs[0].results[split]["class"].unique())
                    by_classes.setdefault(classes, []).append(replace(method, runs=runs))
            for classes, tested in by_classes.items():
                title = f"{dataset}, {split}" + (f", {', '.join(classes)}" if len(by_classes) > 1 else "")
                cases = pd.concat([_cases(method, split, classes) for method in tested], ignore_index=True)
                comparisons.append(Comparison(title, dataset, split, classes, {m.name: m for m in tested}, cases))
    return comparisons


def paired_tests(comparison: Comparison) -> pd.DataFrame:
    """Test each pair of methods on the cases of both, on Dice and HD95 averaged over classes and seeds.

    Returns a row per convention, metric and pair: the shared cases, those left out because one method lacks them or has
    no number for them, the median of first - second, the two-sided p of Wilcoxon's signed-rank test, p corrected by
    Holm over the pairs of this convention and metric, and where p is NaN a note that says why.
    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    means, families = comparison.per_case().query("`class` == @MEAN"), []
    for convention, metric, unit in comparison.units().itertuples(index=False):
        values = means[(means["convention"] == convention) & (means["metric"] == metric)]
        values = values.pivot(index="case", columns="method", values="value")
        pairs = combinations(comparison.methods, 2) if metric in TESTED else ()
        if tests := [_paired_test(comparison.cases, values, *pair) for pair in pairs]:
            family = pd.DataFrame(tests).assign(convention=convention, metric=metric, unit=unit)
            families.append(family.assign(p_holm=holm(family["p"])))
    columns = "first second convention metric unit shared_cases left_out_cases median_difference p p_holm note".split()
    return pd.concat(families)[columns] if families else pd.DataFrame(columns=columns)


def holm(p: pd.Series) -> pd.Series:
    """Correct p values by Holm's method: the smallest of m times m, the next times m - 1, and so on, never falling."""
    ordered = p.dropna().sort_values(kind="stable")
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def striking_cases(comparison: Comparison, count: int) -> list[str]:
    """Return the cases on which the strict Dice of the methods' first seeds differs most; at a tie, the worst first."""
    first = comparison.cases.query("run == 0 and convention == 'strict' and metric == 'dice'")
    dice = first.groupby(["case", "method"], sort=False)["value"].mean().unstack().dropna()
    ranks = pd.DataFrame({"spread": dice.min(axis=1) - dice.max(axis=1), "total": dice.sum(axis=1)}).round(6)
    return list(ranks.sort_values(["spread", "total"], kind="stable").index[:count])


@cache
def _defaults(dataset: str) -> dict[str, Any]:
    """Return the default of every training argument."""
    return vars(training_parser("", DATASETS[dataset]).parse_args([]))


def _methods(runs: Sequence[tuple[str | None, Run]]) -> list[Method]:
    """Group the runs of one data set."""
    kinds = [json.dumps(run.settings, sort_keys=True, default=str) for _, run in runs]
    names: dict[str, str] = {}
    for (name, _), kind in zip(runs, kinds, strict=True):
        if name:
            names.setdefault(kind, name)
    for (_, run), kind in zip(runs, kinds, strict=True):
        if kind not in names:
            names[kind] = _name(run, [other for _, other in runs], {*names.values(), *(name for name, _ in runs)})
    groups: dict[str, list[tuple[Run, str]]] = {}
    for (name, run), kind in zip(runs, kinds, strict=True):
        groups.setdefault(name or names[kind], []).append((run, kind))
    methods = []
    for name, members in groups.items():
        seeds: dict[tuple[Any, str], Run] = {}
        for run, kind in members:
            first = seeds.setdefault((run.args.get("seed"), kind), run)
            if first is not run:
                logger.warning("left out: %s repeats the settings and the seed of %s", run.folder, first.folder)
        if differing := differing_settings([run for run, _ in members]):
            logger.warning("the runs named %s count as seeds of one method but differ in %s", name, differing)
        methods.append(Method(name, tuple(seeds.values())))
    return methods


def _name(run: Run, others: Sequence[Run], taken: set[str | None]) -> str:
    """Return a name that is not taken: the network, and the settings in which it differs from defaults and others."""
    own, defaults = run.settings, _defaults(run.dataset)
    differing = differing_settings([other for other in others if other.settings["network"] == own["network"]])
    # Paths are too long for a name; the table of settings has them.
    apart = [n for n in differing if own.get(n) != defaults.get(n) and not n.endswith(("_path", "_dir"))]
    name = ", ".join([own["network"], *(n if own.get(n) is True else f"{n} {own.get(n)}" for n in apart)])
    while name in taken:
        name += " (2)"
    return name


def _scores(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a table of `cases.csv` into one row per case, class, convention and metric.

    Columns: case, class, state, selected_on, convention, metric, unit ("%", "mm", "voxels" or "pixels") and value (NaN
    where a convention leaves a class out).
    """
    rows = table.melt(["case", "class", "state", "selected_on", "strict_unit"], NUMBERS)
    rows[["convention", "metric"]] = rows.pop("variable").str.split("_", expand=True)
    percent, unit = rows["metric"].isin(["dice", "jaccard"]), rows.pop("strict_unit")
    rows["value"] = rows["value"].where(~percent, 100 * rows["value"])
    unit = unit.mask((rows["convention"] == "transunet") & (unit == "mm"), "voxels")
    return rows.assign(unit=unit.mask(percent, "%"))


def _cases(method: Method, split: str, classes: tuple[str, ...]) -> pd.DataFrame:
    """Return the rows of a method's runs, of the cases that all its runs have."""
    for run in method.runs:
        if (found := tuple(run.results[split]["class"].unique())) != classes:
            raise RunError(
                f"{run.folder} has the classes {', '.join(found)}, but {method.runs[0].folder} of the same name has "
                f"{', '.join(classes)}: give the two different names"
            )
    rows = pd.concat([run.results[split].assign(run=i) for i, run in enumerate(method.runs)]).assign(method=method.name)
    shared = rows.groupby("case")["run"].transform("nunique") == len(method.runs)
    if not shared.any():
        raise RunError(f"the seeds of {method.name} have no case of {split} in common: test them on the same list")
    if not shared.all():
        counts = rows["case"][shared].nunique(), rows["case"].nunique()
        logger.warning("%s: only %d of %d cases of %s count, those of all seeds", method.name, *counts, split)
    return rows[shared]


def _with_mean(values: pd.DataFrame) -> pd.DataFrame:
    """Add rows of the class "mean", the mean over the classes without NaN."""
    others = [column for column in values if column not in ("class", "value")]
    mean = values.groupby(others, sort=False, as_index=False)["value"].mean()
    return pd.concat([values, mean.assign(**{"class": MEAN})], ignore_index=True)


def _paired_test(cases: pd.DataFrame, values: pd.DataFrame, first: str, second: str) -> dict[str, Any]:
    from scipy.stats import wilcoxon

    pair = values[[first, second]].dropna()
    differences = (pair[first] - pair[second]).round(6)  # rounding errors must not order equal differences
    differ = differences[differences != 0]
    p, note = np.nan, ""
    if len(differ) >= LEAST_CASES:
        p = wilcoxon(differ).pvalue
    else:
        found = f"{len(differ)} cases differ" if len(pair) >= LEAST_CASES else f"{len(pair)} shared cases"
        note = f"{found}; p < 0.05 needs at least {LEAST_CASES}"
    tested = cases["case"][cases["method"].isin([first, second])].nunique()
    return {
        "first": first, "second": second, "shared_cases": len(pair), "left_out_cases": tested - len(pair),
        "median_difference": differences.median(), "p": p, "note": note,
    }  # fmt: skip
