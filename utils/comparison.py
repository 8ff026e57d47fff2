"""Which run folders are seeds of one method, how methods score on the cases they share, and what differs by chance."""

import csv
import json
import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from datasets import DatasetInfo
from utils.arguments import VARIANT_DEFAULTS
from utils.errors import RunError
from utils.evaluation import CONVENTIONS, CaseResult, read_case_csv
from utils.metrics import Metrics

logger = logging.getLogger(__name__)

NOT_THE_METHOD = (
    "seed", "output_dir", "resume", "device", "n_gpu", "num_workers", "cache_gib", "eval_batch_size", "deterministic",
    "volume_path", "selected_on", "checkpoint_minutes", "checkpoint_iterations", "keep",
)  # fmt: skip
"""Arguments in which the seeds of one method may differ: where and when it ran, and what follows from others."""

NETWORK = "sim_mpnet"
"""What a run without `--network` trained."""

TESTED = ("dice", "hd95")
"""Metrics that paired tests are made of."""

LEAST_CASES = 6
"""Fewer differences than these give no p below 0.05, whatever they are."""


@dataclass(frozen=True)
class Results:
    """What `cases.csv` of one run and split says: its cases, what the checkpoint was chosen on, `val` or `test`."""

    cases: Mapping[str, CaseResult]
    class_names: tuple[str, ...]
    selected_on: str


@dataclass(frozen=True)
class Run:
    """One run folder: its merged arguments, its data set and classes, `metrics.csv`, and its results by split."""

    folder: Path
    args: Mapping[str, Any]
    dataset: str
    history: Sequence[Mapping[str, str]]
    results: Mapping[str, Results]

    @property
    def checkpoint(self) -> Path:
        """The file whose results these are."""
        return self.folder / "best.pth"


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone, or that the user gave one name. `settings`: the arguments but those."""

    name: str
    runs: tuple[Run, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        return self.runs[0].dataset


@dataclass(frozen=True)
class Scores:
    """What one method scored on the cases that all its seeds were tested on.

    values: by convention, float64 (seeds, cases, classes, 4), the last axis as `Metrics`, in [0, 1] and units, NaN
    where a convention leaves a class out; states: (seeds, cases, classes) of text; unit: of the strict distances.
    """

    cases: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    states: np.ndarray
    unit: str
    selected_on: str

    @property
    def num_seeds(self) -> int:
        return len(self.states)

    def per_case(self, convention: str) -> np.ndarray:
        """Give each case's values, seeds averaged: (cases, classes + 1, 4), the last class the mean of the others."""
        return _with_mean(_mean(self.values[convention]))

    def spread(self, convention: str) -> "Spread":
        """Average over cases and seeds, and say how far seeds and cases lie apart."""
        per_seed = _with_mean(_mean(np.swapaxes(self.values[convention], 0, 1)))  # (seeds, classes + 1, 4)
        return Spread(_mean(per_seed), _deviation(per_seed), _deviation(self.per_case(convention)))

    def distance_unit(self, convention: str) -> str:
        """Give the unit of HD95 and ASSD."""
        return "voxels" if convention == "transunet" and self.unit != "pixels" else self.unit


@dataclass(frozen=True)
class Spread:
    """Each (classes + 1, 4), the last class the mean over classes: means over seeds of the means over cases, their
    standard deviation over seeds (NaN for one seed), and that over cases, seeds averaged first (NaN for one case).
    """

    mean: np.ndarray
    over_seeds: np.ndarray
    over_cases: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """The methods that were tested on one split of one data set with the same classes, and what each scored."""

    title: str
    dataset: str
    split: str
    class_names: tuple[str, ...]
    methods: Mapping[str, Method]
    scores: Mapping[str, Scores]

    def distance_unit(self, convention: str) -> str:
        """Give the unit of HD95 and ASSD; `mm or voxels` where methods were tested on files with and without it."""
        return " or ".join(
            sorted({unit for s in self.scores.values() for unit in s.distance_unit(convention).split(" or ")})
        )


@dataclass(frozen=True)
class PairedTest:
    """Wilcoxon's signed-rank test of two methods on the mean over classes of the cases that both were tested on.

    left_out: cases that one of them lacks or scores NaN; median: of the differences first - second, in [0, 1] or the
    unit of distances; p: two-sided, holm: corrected over all pairs of this metric and convention; both NaN where there
    was nothing to test, and `note` says why.
    """

    first: str
    second: str
    convention: str
    metric: str
    shared: int
    left_out: int
    median: float
    p: float
    holm: float = float("nan")
    note: str = ""


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises RunError for one that no training script wrote, or whose files are damaged."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is no run folder, it has no config.json: give folders that train_<set>.py wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        args, dataset = dict(config["args"]), str(config["data"]["dataset"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not what a training script writes ({type(error).__name__}: {error}): copy it again"
        ) from error
    results = {}
    for cases in sorted(folder.glob("results_*/cases.csv")):
        rows, class_names, selected_on = read_case_csv(cases)
        results[cases.parent.name.removeprefix("results_")] = Results(
            {result.name: result for result in rows}, tuple(class_names), selected_on
        )
    return Run(folder, args, dataset, _read_history(folder / "metrics.csv"), results)


def command_to_test(run: Run, dataset: DatasetInfo, split: str | None = None) -> str:
    """Give the command that tests a run, on a split or on the test script's own."""
    words = ["python", f"test_{run.dataset}.py", "--checkpoint", str(run.checkpoint)]
    if split is not None:
        words += ["--split", split]
    folder = "root_path" if dataset.planar else "volume_path"
    for name, default in ((folder, getattr(dataset, folder)), ("list_dir", dataset.list_dir), ("label_order", None)):
        value = run.args.get(name)
        if value not in (None, default):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def leave_out(run: Run, dataset: DatasetInfo, split: str | None) -> str:
    """Warn that a run was not tested, on a split or at all, with the command that tests it; returns the command."""
    command, where = command_to_test(run, dataset, split), f" on {split}" if split else ""
    logger.warning("%s was not tested%s and is left out; test it with: %s", run.folder, where, command)
    return command


def group_runs(
    runs: Sequence[tuple[str | None, Run]],
    defaults: Mapping[str, Mapping[str, Any]],
    of_others: Mapping[str, Collection[str]],
) -> list[Method]:
    """Put the seeds of each method together and name the methods.

    runs: each with the name that the user gave it, or None. Runs of one name are one method; one without a name is of
    the method whose settings it has. A method without a name is called by its network and by those settings that set
    it apart from others of its network, the defaults left out. defaults: of every data set the training arguments'
    defaults, for what an older `config.json` does not have. of_others: by network the arguments that are for others
    only, which are not its settings. A second run of the same seed is left out, with a warning.
    """
    settings = [_settings(run, defaults[run.dataset], of_others) for _, run in runs]
    kinds = [
        json.dumps([run.dataset, own], sort_keys=True, default=str)
        for (_, run), own in zip(runs, settings, strict=True)
    ]
    given: dict[str, str] = {}
    for (name, _), kind in zip(runs, kinds, strict=True):
        if name is not None:
            given.setdefault(kind, name)
    groups: dict[tuple[str, str | None, str | None], list[int]] = {}
    for i, (name, run) in enumerate(runs):
        name = name or given.get(kinds[i])
        groups.setdefault((run.dataset, name, None if name else kinds[i]), []).append(i)
    methods, names = [], _names({key: settings[members[0]] for key, members in groups.items()}, defaults)
    for key, members in groups.items():
        seen: dict[tuple[Any, str], Run] = {}
        for i in members:
            run = runs[i][1]
            first = seen.setdefault((run.args.get("seed"), kinds[i]), run)
            if first is not run:
                logger.warning(
                    "%s is left out: it has the settings and the seed (%s) of %s, and a repeat is no other seed",
                    run.folder, run.args.get("seed"), first.folder,
                )  # fmt: skip
        if differing := _differing([settings[i] for i in members]):
            logger.warning(
                "the runs called %s differ in %s; they are taken as seeds of one method",
                names[key],
                ", ".join(differing),
            )
        methods.append(Method(names[key], tuple(seen.values()), settings[members[0]]))
    return methods


def differing_settings(methods: Sequence[Method]) -> list[str]:
    """Give the names of the settings that not all methods share, in the order of the configuration."""
    return _differing([method.settings for method in methods])


def compare(
    methods: Sequence[Method], datasets: Mapping[str, DatasetInfo], splits: Sequence[str] | None = None
) -> list[Comparison]:
    """Put the methods side by side, one comparison per data set, split and choice of classes.

    splits: those to compare on, or None for all that any run was tested on. A run that was not tested there is left
    out, with a warning that gives the command. Raises RunError where nothing is left.
    """
    comparisons, commands = [], []
    for dataset in dict.fromkeys(method.dataset for method in methods):
        of_set = [method for method in methods if method.dataset == dataset]
        tested = dict.fromkeys(split for method in of_set for run in method.runs for split in run.results)
        for split in splits or tested or [None]:
            tables: dict[tuple[str, ...], dict[str, Method]] = {}
            for method in of_set:
                for run in method.runs:
                    if split not in run.results:
                        commands.append(leave_out(run, datasets[dataset], split))
                runs = tuple(run for run in method.runs if split in run.results)
                if runs:
                    classes = runs[0].results[split].class_names
                    tables.setdefault(classes, {})[method.name] = Method(method.name, runs, method.settings)
            for classes, of_table in tables.items():
                scores = {name: _scores(method, split) for name, method in of_table.items()}
                title = f"{dataset}, {split}" if len(tables) == 1 else f"{dataset}, {split}, {', '.join(classes)}"
                comparisons.append(Comparison(title, dataset, split, classes, of_table, scores))
    if not comparisons:
        raise RunError(f"none of {len(commands)} runs was tested, so nothing can be compared; first: {commands[0]}")
    return comparisons


def paired_tests(comparison: Comparison) -> list[PairedTest]:
    """Test every pair of methods on every tested metric under both conventions, corrected by Holm over the pairs.

    Source: Wilcoxon, Biometrics Bulletin 1945; Holm, Scandinavian Journal of Statistics 1979.
    """
    tests = []
    for convention in CONVENTIONS:
        for metric in TESTED:
            column = Metrics._fields.index(metric)
            values = {
                name: dict(zip(scores.cases, scores.per_case(convention)[:, -1, column].tolist(), strict=True))
                for name, scores in comparison.scores.items()
            }
            family = [_paired_test(*pair, convention, metric, values) for pair in combinations(values, 2)]
            corrected = holm([test.p for test in family])
            tests += [replace(test, holm=p) for test, p in zip(family, corrected, strict=True)]
    return tests


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for being many, in their order; NaN stays NaN and does not count.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than the one before, or
    larger than 1.
    """
    corrected = [float("nan")] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if p == p), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def striking_cases(comparison: Comparison, count: int) -> list[str]:
    """Give the cases on which the strict Dice of the methods' first seeds lies furthest apart, of equals the worst."""
    dice: dict[str, list[float]] = {}
    for scores in comparison.scores.values():
        first = _with_mean(scores.values["strict"][0])[:, -1, 0]
        for case, value in zip(scores.cases, first.tolist(), strict=True):
            dice.setdefault(case, []).append(value)
    there = {case: values for case, values in dice.items() if len(values) == len(comparison.scores)}
    known = [case for case, values in there.items() if not np.isnan(values).any()]
    return sorted(known, key=lambda case: (min(there[case]) - max(there[case]), sum(there[case])))[:count]


def _read_history(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def _settings(run: Run, defaults: Mapping[str, Any], of_others: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Give the arguments that make the method, with the defaults of those that the run's version did not have."""
    chosen_by_variant = VARIANT_DEFAULTS.get(run.args.get("variant"), {})
    known = {name: chosen_by_variant.get(name, value) for name, value in defaults.items()}
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in {**known, **run.args}.items()}
    left_out = {*NOT_THE_METHOD, *of_others.get(settings.get("network", NETWORK), ())}
    return {name: value for name, value in settings.items() if name not in left_out and value is not None}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for some in settings for name in some)
    return [name for name in names if any(some.get(name) != settings[0].get(name) for some in settings)]


def _names(settings: Mapping[tuple, Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]) -> dict[tuple, str]:
    """Name every group of runs, whose key is its data set, the user's name or None, and what tells it apart."""
    names = {key: key[1] for key in settings if key[1] is not None}
    for key, own in settings.items():
        if key in names:
            continue
        network = own.get("network", NETWORK)
        rivals = [s for k, s in settings.items() if k[0] == key[0] and s.get("network", NETWORK) == network]
        apart = [name for name in _differing(rivals) if own.get(name) != defaults[key[0]].get(name)]
        apart = [name for name in apart if not name.endswith(("_path", "_dir"))]  # too long; the table has them
        name = ", ".join([network, *(_setting(name, own.get(name)) for name in apart)])
        while any(k[0] == key[0] and taken == name for k, taken in names.items()):
            name += " (2)"
        names[key] = name
    return names


def _setting(name: str, value: Any) -> str:
    return name if value is True else f"{name} {value}"


def _scores(method: Method, split: str) -> Scores:
    results = [run.results[split] for run in method.runs]
    for run, result in zip(method.runs, results, strict=True):
        if result.class_names != results[0].class_names:
            raise RunError(
                f"{run.folder} has the classes {', '.join(result.class_names)}, {method.runs[0].folder} "
                f"{', '.join(results[0].class_names)}: give the two different names"
            )
    cases = tuple(case for case in results[0].cases if all(case in result.cases for result in results))
    most = max(len(result.cases) for result in results)
    if not cases:
        raise RunError(f"the seeds of {method.name} share no case of {split}: test them on the same list")
    if len(cases) < most:
        logger.warning(
            "%s: %d of %d cases of %s are of all seeds; the others do not count", method.name, len(cases), most, split
        )
    values = {
        convention: np.array(
            [[[getattr(c, convention) for c in r.cases[case].classes] for case in cases] for r in results]
        )
        for convention in CONVENTIONS
    }
    states = np.array([[[c.state for c in r.cases[case].classes] for case in cases] for r in results])
    units = sorted({result.cases[case].unit for result in results for case in cases})
    on_test = any(result.selected_on == "test" for result in results)
    return Scores(cases, values, states, " or ".join(units), "test" if on_test else "val")


def _paired_test(
    first: str, second: str, convention: str, metric: str, values: Mapping[str, Mapping[str, float]]
) -> PairedTest:
    from scipy.stats import wilcoxon

    a, b = values[first], values[second]
    differences = np.array([a[case] - b[case] for case in a if case in b])
    differences = differences[~np.isnan(differences)]
    left_out = len(a.keys() | b.keys()) - len(differences)
    median = float(np.median(differences)) if len(differences) else float("nan")
    apart = differences[np.abs(differences) > 1e-9]  # equal cases say nothing of the direction
    p, note = float("nan"), ""
    if len(apart) >= LEAST_CASES:
        p = float(wilcoxon(apart).pvalue)
    elif len(differences) >= LEAST_CASES:
        note = f"{len(apart)} cases differ; {LEAST_CASES} are the least that can give p < 0.05"
    else:
        note = f"{len(differences)} shared cases; {LEAST_CASES} are the least that can give p < 0.05"
    return PairedTest(first, second, convention, metric, len(differences), left_out, median, p, note=note)


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over the first axis without the NaN; NaN where nothing is left."""
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _deviation(values: np.ndarray) -> np.ndarray:
    """Give the sample's standard deviation over the first axis without the NaN; NaN for fewer than two."""
    return np.ma.masked_invalid(values).std(0, ddof=1).filled(np.nan)


def _with_mean(values: np.ndarray) -> np.ndarray:
    """Add to (n, classes, 4) the mean over classes as a last class."""
    return np.concatenate([values, _mean(np.swapaxes(values, 0, 1))[:, None]], axis=1)
