"""Name the method of each tested run, average the scores of its seeds, and test which differences may be chance."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from datasets import DatasetInfo
from datasets.errors import counted
from utils.errors import RunError
from utils.metrics import FOUND, MISSED, SPURIOUS
from utils.tested_runs import Run

logger = logging.getLogger(__name__)

# The metrics: their column, and their name in tables and figures.
NAMES = {"dice": "Dice", "hd95": "HD95", "jaccard": "Jaccard", "assd": "ASSD"}
MEAN = "mean"  # stands in the column `class` for the mean over the classes
TESTED = ("dice", "hd95")  # the metrics of the paired tests and of the tables of each class
LEAST_CASES = 6  # with fewer differences, Wilcoxon's test cannot give p < 0.05
KEYS = ["method", "convention", "class", "metric", "unit"]


@dataclass
class Comparison:
    """The methods that were tested on the same data."""

    info: DatasetInfo
    data: str  # as in `Run`, followed by the class names if they are not the data set's own
    split: str
    class_names: tuple[str, ...]
    methods: dict[str, list[Run]]  # the seeds of each method
    cases: pd.DataFrame  # results with `method`, only for cases on which all its seeds were tested

    def means(self, keys: Sequence[str]) -> pd.DataFrame:
        """Return the mean `value` for each value of `keys`, without NaN; the class "mean" is the mean over classes."""
        values = self.cases.groupby(keys, sort=False, as_index=False)["value"].mean()
        others = [key for key in keys if key != "class"]
        over_classes = values.groupby(others, sort=False, as_index=False)["value"].mean()
        return pd.concat([values, over_classes.assign(**{"class": MEAN})], ignore_index=True)

    def per_case(self) -> pd.DataFrame:
        """Return `means` for each case, averaged over seeds."""
        return self.means([*KEYS, "case"])

    def scores(self) -> pd.DataFrame:
        """Return `mean`, `sd_over_seeds` and `sd_over_cases` for each value of `KEYS`, and facts about each method.

        A mean is taken over the cases of all runs (seeds and folds), then over classes. Standard deviations divide by
        n - 1 and are NaN for n = 1: `sd_over_seeds` is that of the runs' means, `sd_over_cases` that of `per_case`.
        `seeds` is the largest number of seeds in a fold. `missed` and `spurious` classes count once for each case, as
        means over its runs. `chosen_on` is `test` if it is `test` for any run.
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


def name_methods(runs: Sequence[Run]) -> list[Run]:
    """Name the method of each run of one data set; return the runs without repeats of settings, seed and fold.

    If the user gave no name, the method is named after its network and after the settings in which it differs from
    others of its network. A setting with its default value is not part of the name.
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
        logger.warning("left out: %s repeats the settings, seed and fold of another run of %s", run.folder, run.method)
    return list(itertools.compress(runs, ~repeats))


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method."""
    return {name: [run for run in runs if run.method == name] for name in dict.fromkeys(run.method for run in runs)}


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Return the comparisons of runs with the same `data`: one for each split and each set of class names."""
    comparisons, info = [], runs[0].info
    tables = [run.results.assign(method=run.method, fold=run.args.get("fold", 0)) for run in runs]
    results = pd.concat(tables, ignore_index=True)
    for (split, class_names), cases in results.groupby(["split", "classes"], sort=False):
        seeds = cases.groupby(["method", "fold"])["run"].transform("nunique")  # number of seeds in the fold of the case
        shared = cases.groupby(["method", "fold", "case"])["run"].transform("nunique") == seeds
        for name, left_out in cases[~shared].groupby("method")["case"].nunique().items():
            if name not in set(cases["method"][shared]):
                raise RunError(f"the seeds of {name} have no case of {split} in common: test them on the same list")
            logger.warning("%s: cases not in all seeds are left out of %s: %s", name, split, counted(left_out, "case"))
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

    Tests of earlier versions recorded only which classes a label has.
    """
    once = cases.query("convention == 'strict' and metric == 'hd95'")
    once = once.assign(in_label=once["state"].isin([FOUND, MISSED]))
    for fact in ("unit", "in_label", "label"):
        different = once.groupby(["case", "class"])[fact].transform("nunique") > 1  # NaN (unknown) does not count
        if not different.any():
            continue
        (name, _), rows = next(iter(once[different].groupby(["case", "class"], sort=False)))
        first, second = rows.dropna(subset=fact).drop_duplicates(fact)["run"].iloc[:2]
        raise RunError(
            f"{name} has another label or unit in the test of {second} than in that of {first}: test both on the same "
            "files, or leave one of them out"
        )


def _check_folds(cases: pd.DataFrame) -> None:
    """Warn if a method mixes folds of two divisions of the data, or if some folds have more seeds than others."""
    for name, of_method in cases.groupby("method"):
        folds = of_method.groupby("case")["fold"].nunique()
        if folds.nunique() > 1:
            most, least = folds.idxmax(), folds.idxmin()
            logger.warning(
                "%s: %s was tested in %d folds (%s) and %s in %d, so the first counts more often: are some runs of an "
                "older division of the data?", name, most, folds[most],
                ", ".join(of_method.loc[of_method["case"] == most, "run"].unique()), least, folds[least],
            )  # fmt: skip
        seeds = of_method.groupby("fold")["run"].nunique()
        if seeds.nunique() > 1:
            text = "%s: its folds have %d to %d seeds, so the cases of folds with more seeds weigh more in its mean"
            logger.warning(text, name, seeds.min(), seeds.max())


def paired_tests(comparison: Comparison) -> pd.DataFrame:
    """Test each pair of methods on the cases that both have, by Dice and HD95 averaged over classes and seeds.

    Returns a row per convention, metric and pair: the numbers of shared cases and of cases that are left out because a
    method lacks them or has no value for them, the median of first - second, the two-sided p of Wilcoxon's signed-rank
    test, p_holm (p corrected by Holm over the pairs of this convention and metric), and, if p is NaN, a note why.
    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    from scipy.stats import wilcoxon

    rows, family = [], ["convention", "metric", "unit"]
    means = comparison.per_case().query("`class` == @MEAN and metric in @TESTED")
    for key, values in means.groupby(family, sort=False):
        for first, second in itertools.combinations(comparison.methods, 2):
            pair = values[values["method"].isin([first, second])].pivot(index="case", columns="method", values="value")
            # Round, so that rounding errors do not rank equal differences.
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
    """Correct m p values by Holm's method: the smallest times m, the next times m - 1, ..., never decreasing."""
    ordered = p.dropna().sort_values(kind="stable")
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)
