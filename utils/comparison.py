"""Read run folders, name the method of each run, average the scores of its seeds and test which differences are chance.

All results are one pandas table with a row per run, split, case, class, convention and metric.
"""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets import DATASETS
from datasets.errors import brief
from utils.arguments import VARIANT_DEFAULTS, flags_of_others, training_parser
from utils.errors import RunError
from utils.metrics import MISSED, SPURIOUS
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
    "volume_path", "selected_on", "checkpoint_minutes", "checkpoint_iterations", "keep", "augment_on",
}  # fmt: skip
TEST_COLUMNS = (
    "dataset split first second convention metric unit shared_cases left_out_cases median_difference p p_holm note"
).split()
KEYS = ["method", "convention", "class", "metric", "unit"]


@dataclass
class Run:
    """One run folder."""

    folder: Path
    args: dict[str, Any]  # arguments of the training
    dataset: str
    settings: dict[str, str]  # the arguments that make the method
    history: pd.DataFrame  # metrics.csv, empty without one
    results: dict[str, pd.DataFrame]  # by split, a row per case, class, convention and metric
    method: str  # the name that the user gave, or empty until `name_methods`

    @property
    def checkpoint(self) -> Path:
        """Return the checkpoint that was tested."""
        return self.folder / "best.pth"

    @property
    def kind(self) -> frozenset[tuple[str, str]]:
        """Return what is equal for runs with equal settings."""
        return frozenset(self.settings.items())


@dataclass
class Comparison:
    """The methods that were tested on one split of one data set with the same classes."""

    title: str
    dataset: str
    split: str
    class_names: tuple[str, ...]
    methods: dict[str, list[Run]]  # the seeds of each method
    cases: pd.DataFrame  # results with `method` and `run`, only of cases on which all seeds of a method were tested

    def per_case(self) -> pd.DataFrame:
        """Return `value` by `KEYS` and case, averaged over seeds and without NaN; class "mean": over the classes."""
        return _with_mean(self.cases.groupby([*KEYS, "case"], sort=False, as_index=False)["value"].mean())

    def scores(self) -> pd.DataFrame:
        """Return `mean`, `sd_over_seeds` and `sd_over_cases` by `KEYS`, and facts of each method.

        A mean is over cases, then over classes, then over seeds. The standard deviations divide by n - 1: that over
        seeds is of the means over cases, that over cases is of `per_case`. Each is NaN for n = 1. The facts are
        `seeds`, `cases`, `chosen_on` (val or test), and the missed and spurious classes per seed.
        """
        per_seed = _with_mean(self.cases.groupby([*KEYS, "run"], sort=False, as_index=False)["value"].mean())
        seeds, cases = (frame.groupby(KEYS, sort=False)["value"] for frame in (per_seed, self.per_case()))
        frame = {"mean": seeds.mean(), "sd_over_seeds": seeds.std(), "sd_over_cases": cases.std()}
        once = self.cases.query("convention == 'strict' and metric == 'dice'").groupby("method")
        facts = once.agg(seeds=("run", "nunique"), cases=("case", "nunique"))
        facts["chosen_on"] = once["selected_on"].agg(lambda on: "test" if (on == "test").any() else "val")
        for state in (MISSED, SPURIOUS):
            facts[state] = once["state"].agg(lambda states, state=state: (states == state).sum()) / facts["seeds"]
        return pd.DataFrame(frame).reset_index().merge(facts, on="method")


def read_run(folder: str | Path, method: str = "") -> Run:
    """Read a run folder. Raises RunError if no training script wrote it, or if a file in it is damaged."""
    folder, results, history = Path(folder), {}, pd.DataFrame()
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder, it has no config.json: give folders that train_<set>.py wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        args, dataset = dict(config["args"]), config["data"]["dataset"]
        settings = _settings(args, dataset)
        path = folder / "metrics.csv"
        if path.is_file():
            history = pd.read_csv(path, encoding_errors="replace")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is damaged or not of train_<set>.py ({type(error).__name__}: {brief(error)}): copy it again"
        ) from error
    for path in sorted(folder.glob("results_*/cases.csv")):
        results[path.parent.name.removeprefix("results_")] = _long(read_cases(path))
    return Run(folder, args, dataset, settings, history, results, method)


def drop_untested(runs: Sequence[Run], splits: Sequence[str] | None = None) -> list[Run]:
    """Return the runs that were tested on one of the splits; a warning gives the command that tests the others.

    splits: None for all on which any run of the data set was tested. Raises RunError if no run is left.
    """
    for run in runs:
        tested = dict.fromkeys(split for other in runs if other.dataset == run.dataset for split in other.results)
        for split in [s for s in splits or tested or DATASETS[run.dataset].splits[-1:] if s not in run.results]:
            info = DATASETS[run.dataset]
            folders = ("root_path" if info.planar else "volume_path", "list_dir")
            moved = {name: run.args.get(name) for name in folders if run.args.get(name) != getattr(info, name)}
            flags = {"checkpoint": run.checkpoint, "split": split} | {n: f for n, f in moved.items() if f is not None}
            words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
            command = shlex.join(["python", f"test_{run.dataset}.py", *words])
            logger.warning("%s was not tested on %s; test it with: %s", run.folder, split, command)
    kept = [run for run in runs if any(split in run.results for split in splits or run.results)]
    if not kept:
        raise RunError(f"no run was tested on {split}; test one with: {command}")
    return kept


def name_methods(runs: Sequence[Run]) -> list[Run]:
    """Name the method of each run of one data set; return the runs that do not repeat settings and seed of another.

    A run that the user did not name belongs to the named method that has its settings, or else to a method named after
    its network and after those settings, except defaults, in which it differs from others of its network.
    """
    named = {run.kind: run.method for run in reversed(runs) if run.method}
    for run in runs:
        if run.kind not in named:
            named[run.kind] = _name(run, runs, {*named.values()})
    seeds: dict[Any, Run] = {}
    for run in runs:
        run.method = run.method or named[run.kind]
        first = seeds.setdefault((run.method, run.args.get("seed"), run.kind), run)
        if first is not run:
            logger.warning("left out: %s repeats the settings and the seed of %s", run.folder, first.folder)
    for name, members in by_method(runs).items():
        if differing := differing_settings(members):
            logger.warning("the runs named %s count as seeds of one method but differ in %s", name, differing)
    return list(seeds.values())


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method."""
    return {name: [run for run in runs if run.method == name] for name in dict.fromkeys(run.method for run in runs)}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that are not alike in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def compare(runs: Sequence[Run], splits: Sequence[str] | None = None) -> list[Comparison]:
    """Return one comparison of the runs of one data set for each split and choice of classes.

    splits: those to compare on; None for all. Raises RunError if the seeds of a method have no case in common.
    """
    dataset = runs[0].dataset
    tables = [
        table.assign(split=split, method=run.method, run=str(run.folder))
        for run in runs
        for split, table in run.results.items()
        if split in (splits or run.results)
    ]
    comparisons = []
    for (split, class_names), cases in pd.concat(tables, ignore_index=True).groupby(["split", "classes"], sort=False):
        title = f"{dataset}, {split}"
        if class_names != DATASETS[dataset].class_names:
            title += f", {', '.join(class_names)}"
        seeds = cases.groupby("method")["run"].transform("nunique")
        cases["shared"] = cases.groupby(["method", "case"])["run"].transform("nunique") == seeds
        for name, of_method in cases.groupby("method", sort=False):
            count, total = of_method["case"][of_method["shared"]].nunique(), of_method["case"].nunique()
            if not count:
                raise RunError(f"the seeds of {name} have no case of {split} in common: test them on the same list")
            if count < total:
                logger.warning("%s: only %d of %d cases of %s count, those of all seeds", name, count, total, split)
        cases = cases[cases["shared"]].reset_index(drop=True)
        units = cases.groupby(["convention", "metric"])["unit"]
        cases["unit"] = units.transform(lambda unit: " or ".join(sorted(unit.unique())))
        methods = by_method([run for run in runs if str(run.folder) in set(cases["run"])])
        comparisons.append(Comparison(title, dataset, split, class_names, methods, cases))
    return comparisons


def paired_tests(comparison: Comparison) -> pd.DataFrame:
    """Test each pair of methods on the cases of both, on Dice and HD95 averaged over classes and seeds.

    Returns a row per convention, metric and pair, with `TEST_COLUMNS`: the shared cases, those left out because one
    method lacks them or has no number for them, the median of first - second, the two-sided p of Wilcoxon's signed-rank
    test, p corrected by Holm over the pairs of this convention and metric, and where p is NaN a note that says why.
    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    from scipy.stats import wilcoxon

    if len(comparison.methods) < 2:
        return pd.DataFrame(columns=TEST_COLUMNS)
    means, families = comparison.per_case().query("`class` == @MEAN and metric in @TESTED"), []
    for (convention, metric, unit), values in means.groupby(["convention", "metric", "unit"], sort=False):
        rows = []
        for first, second in combinations(comparison.methods, 2):
            pair = values[values["method"].isin([first, second])].pivot(index="case", columns="method")["value"]
            # Rounded, so that rounding errors do not order equal differences.
            differences = (pair[first] - pair[second]).dropna().round(6)
            differ, shared = differences[differences != 0], len(differences)
            p, note = np.nan, f"{len(differ)} of {shared} shared cases differ; p < 0.05 needs at least {LEAST_CASES}"
            if len(differ) >= LEAST_CASES:
                p, note = wilcoxon(differ).pvalue, ""
            rows.append([first, second, shared, len(pair) - shared, differences.median(), p, note])
        columns = ["first", "second", "shared_cases", "left_out_cases", "median_difference", "p", "note"]
        family = pd.DataFrame(rows, columns=columns).assign(convention=convention, metric=metric, unit=unit)
        families.append(family.assign(p_holm=holm(family["p"])))
    return pd.concat(families).assign(dataset=comparison.dataset, split=comparison.split)[TEST_COLUMNS]


def holm(p: pd.Series) -> pd.Series:
    """Correct p values by Holm's method: the smallest of m times m, the next times m - 1, and so on, never falling."""
    ordered = p.dropna().sort_values(kind="stable")
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def striking_cases(comparison: Comparison, count: int) -> list[str]:
    """Return the cases on which the strict Dice of the methods differs most; at a tie, the worst first."""
    values = comparison.per_case().query("`class` == @MEAN and convention == 'strict' and metric == 'dice'")
    dice = values.pivot(index="case", columns="method", values="value").dropna()
    ranks = pd.DataFrame({"spread": dice.min(axis=1) - dice.max(axis=1), "total": dice.sum(axis=1)}).round(6)
    return list(ranks.sort_values(["spread", "total"], kind="stable").index[:count])


@cache
def _defaults(dataset: str) -> dict[str, Any]:
    """Return the default of every training argument."""
    return vars(training_parser("", DATASETS[dataset]).parse_args([]))


def _settings(args: dict[str, Any], dataset: str) -> dict[str, str]:
    """Return the arguments that make the method, with defaults for those that the run's version did not have."""
    args = _defaults(dataset) | VARIANT_DEFAULTS.get(args.get("variant"), {}) | args
    left_out = NOT_THE_METHOD | flags_of_others().get(args["network"], set())
    return {name: str(value) for name, value in args.items() if name not in left_out and value is not None}


def _name(run: Run, runs: Sequence[Run], taken: set[str]) -> str:
    """Return a name that is not taken: the network, and the settings in which it differs from defaults and others."""
    network = run.settings["network"]
    defaults, words = _settings({"network": network}, run.dataset), [network]
    for name in differing_settings([other for other in runs if other.settings["network"] == network]):
        value = run.settings.get(name)
        # Paths are too long for a name; the table of settings has them.
        if value != defaults.get(name) and not name.endswith(("_path", "_dir")):
            words.append(name if value == "True" else f"{name} {value}")
    name = ", ".join(words)
    while name in taken:
        name += " (2)"
    return name


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a table of `cases.csv` into one row per case, class, convention and metric.

    Columns: case, class, state, selected_on, convention, metric, unit ("%", "mm", "voxels" or "pixels"), value (NaN
    where a convention leaves a class out) and classes (the names of all).
    """
    rows = table.melt(["case", "class", "state", "selected_on", "strict_unit"], NUMBERS)
    rows[["convention", "metric"]] = rows.pop("variable").str.split("_", expand=True)
    percent, unit = rows["metric"].isin(["dice", "jaccard"]), rows.pop("strict_unit")
    rows["value"] = rows["value"].where(~percent, 100 * rows["value"])
    unit = unit.mask((rows["convention"] == "transunet") & (unit == "mm"), "voxels")
    return rows.assign(unit=unit.mask(percent, "%"), classes=[tuple(table["class"].unique())] * len(rows))


def _with_mean(values: pd.DataFrame) -> pd.DataFrame:
    """Add rows of the class "mean", the mean over the classes without NaN."""
    others = [column for column in values if column not in ("class", "value")]
    mean = values.groupby(others, sort=False, as_index=False)["value"].mean()
    return pd.concat([values, mean.assign(**{"class": MEAN})], ignore_index=True)
