"""A comparison as tables and files: what each method scores and costs, what was published, what tests say."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.files import atomic_write
from utils.comparison import TESTED, Comparison, Method, PairedTest, differing_settings
from utils.errors import RunError
from utils.evaluation import CONVENTIONS, OPTIMISTIC, read_number
from utils.metrics import MISSED, SPURIOUS, Metrics
from utils.tables import Table

SPREAD = "mean ± SD over seeds (SD over cases)"
"""What stands in a cell."""
PUBLISHED = "published, not measured here: the paper's tables, of its test split; never tested or ranked with ours"
_METRIC_NAMES = {"dice": "Dice", "hd95": "HD95"}
CHOSEN_ON_TEST = "*"
"""Follows the name of a method whose checkpoint was chosen on the test volumes."""


@dataclass(frozen=True)
class Cost:
    """What one image costs a network: parameters, multiply-adds, and on request what was measured on `device`.

    images_per_second: in evaluation; peak_memory: most bytes held beside the weights, of a batch of `batch_size`.
    """

    parameters: int
    multiply_adds: float
    images_per_second: float = math.nan
    peak_memory: float = math.nan
    device: str = ""
    batch_size: int = 0


@dataclass(frozen=True)
class Published:
    """One published row: Dice in percent, HD95 in voxels (of images, pixels), parameters and multiply-adds in 10^6
    and 10^9, Dice per class; a cell that was not printed is NaN.
    """

    method: str
    dice: float
    hd95: float
    parameters_m: float
    gmacs: float
    classes: tuple[float, ...]


def read_published(path: str | Path) -> dict[str, list[Published]]:
    """Read the published rows of each data set; raises RunError for a damaged file."""
    rows: dict[str, list[Published]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                numbers = (read_number(row[name]) for name in ("dsc", "hd95", "params_m", "gmacs"))
                classes = tuple(read_number(row[f"class{i}"]) for i in range(1, 9) if row[f"class{i}"])
                rows.setdefault(row["dataset"], []).append(Published(row["method"], *numbers, classes))
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(
                f"{path}, line {reader.line_num}: {error}; expected published rows, restore the file"
            ) from error
    return rows


def tables(
    comparison: Comparison, costs: Mapping[str, Cost], published: Sequence[Published], tests: Sequence[PairedTest]
) -> list[Table]:
    """Lay a comparison out: per convention means with costs, Dice and HD95 of each class, and paired tests.

    costs: by method, where they are known. Published rows stand in the tables of the convention that papers report by.
    """
    made = []
    for convention in CONVENTIONS:
        beside = published if convention == "transunet" else ()
        made.append(_means_table(comparison, convention, costs, beside))
        if len(comparison.class_names) > 1:
            made.append(_class_table(comparison, convention, "dice", beside))
            made.append(_class_table(comparison, convention, "hd95", ()))
        for metric in TESTED:
            family = [test for test in tests if (test.convention, test.metric) == (convention, metric)]
            made += [_tests_table(comparison, family)] if family else []
    return made


def runs_table(methods: Sequence[Method]) -> Table:
    """List the runs of each method."""
    rows = [(m.name, str(run.args.get("seed", "-")), str(run.folder)) for m in methods for run in m.runs]
    return Table("The runs.", ("method", "seed", "run folder"), rows)


def settings_table(methods: Sequence[Method]) -> Table:
    """List every setting in which not all methods are alike, a column for each method."""
    rows = [
        (name, *(str(method.settings.get(name, "-")) for method in methods)) for name in differing_settings(methods)
    ]
    return Table("Training arguments in which the methods differ.", ("", *(method.name for method in methods)), rows)


def write_csv(
    path: str | Path,
    comparisons: Sequence[Comparison],
    costs: Mapping[tuple[str, str], Cost],
    published: Mapping[str, Sequence[Published]],
) -> None:
    """Write one row per method, convention, class and metric, Dice and Jaccard in percent; `source` tells measured
    rows from published ones. costs: by data set and method. What is not known is an empty cell.
    """
    header = (
        "dataset", "split", "source", "method", "chosen_on", "seeds", "cases", "convention", "class", "metric", "unit",
        "mean", "sd_over_seeds", "sd_over_cases", "parameters", "multiply_adds", "flops", "images_per_second",
        "peak_memory_bytes", "device", "batch_size",
    )  # fmt: skip
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        for comparison in comparisons:
            for row in _measured_rows(comparison, costs):
                writer.writerow({name: _cell(value) for name, value in row.items()})
        for dataset in dict.fromkeys(comparison.dataset for comparison in comparisons):
            names = next(c.class_names for c in comparisons if c.dataset == dataset)
            for row in _published_rows(dataset, names, published.get(dataset, ())):
                writer.writerow({name: _cell(value) for name, value in row.items()})


def write_tests_csv(path: str | Path, tests: Iterable[tuple[Comparison, PairedTest]]) -> None:
    """Write one row per pair, convention and metric; Dice differences are in percentage points."""
    header = (
        "dataset", "split", "first", "second", "convention", "metric", "unit", "shared_cases", "left_out_cases",
        "median_difference", "p", "p_holm", "note",
    )  # fmt: skip
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for comparison, t in tests:
            unit, scale = _unit(comparison, t.convention, t.metric)
            numbers = (scale * t.median, t.p, t.holm)
            pair = (comparison.dataset, comparison.split, t.first, t.second, t.convention, t.metric)
            writer.writerow([*pair, unit, t.shared, t.left_out, *map(_cell, numbers), t.note])


def notes(comparison: Comparison) -> list[str]:
    """Say what a reader of the tables must know, one sentence or two each."""
    said = [
        "Means are over cases, then over classes, then over seeds. The standard deviation (SD) over seeds is of these "
        "means, and missing for one seed; in brackets stands that over cases, seeds averaged first."
    ]
    if len(comparison.methods) > 1:
        said.append(
            "Paired tests: Wilcoxon's signed-rank test, two-sided, over the cases that both methods were tested on "
            "(means over classes, seeds averaged first), corrected by Holm over all pairs of the table. They say "
            "nothing of how far another seed would lie."
        )
    said += [f"Convention {name}: {meaning}." for name, meaning in CONVENTIONS.items()]
    if any(scores.selected_on == "test" for scores in comparison.scores.values()):
        said.append(f"{CHOSEN_ON_TEST} {OPTIMISTIC}")
    counts = {len(scores.cases) for scores in comparison.scores.values()}
    if len(counts) > 1:
        said.append("Not all methods were tested on the same cases; their means are not of the same.")
    return said


def _means_table(
    comparison: Comparison, convention: str, costs: Mapping[str, Cost], published: Sequence[Published]
) -> Table:
    unit = comparison.distance_unit(convention)
    measured = [cost for cost in costs.values() if not math.isnan(cost.images_per_second)]
    header = ["method", "seeds", "cases"]
    header += ["missed", "spurious"] if convention == "strict" else []
    header += ["parameters [M]", "multiply-adds [G]"]
    header += ["images/s", "peak memory [MiB]"] if measured else []
    width = len(header)
    header += ["Dice [%]", f"HD95 [{unit}]", "Jaccard [%]", f"ASSD [{unit}]"]
    rows = []
    for name, scores in comparison.scores.items():
        spread = scores.spread(convention)
        cost = costs.get(name)
        row = [_marked(name, scores.selected_on), str(scores.num_seeds), str(len(scores.cases))]
        if convention == "strict":
            row += [f"{(scores.states == state).sum() / scores.num_seeds:.3g}" for state in (MISSED, SPURIOUS)]
        row += ["-", "-"] if cost is None else [f"{cost.parameters / 1e6:.2f}", f"{cost.multiply_adds / 1e9:.2f}"]
        if measured and cost is None:
            row += ["-", "-"]
        elif measured:
            row += [_number(cost.images_per_second, 1), _number(cost.peak_memory / 2**20, 0)]
        for i, metric in enumerate(Metrics._fields):
            row.append(_spread(spread, -1, i, _unit(comparison, convention, metric)[1]))
        rows.append(row)
    others = [[p.method, *["-"] * (width - 1), _number(p.dice), _number(p.hd95), "-", "-"] for p in published]
    for row, p in zip(others, published, strict=True):
        row[3:5] = _number(p.parameters_m), _number(p.gmacs)
    caption = f"{comparison.title}, {convention} convention, means over classes: {SPREAD}. A multiply-add is two FLOPs."
    if convention == "strict":
        caption += " Missed, spurious: classes in cases, per seed."
    if measured:
        first = measured[0]
        caption += f" Speed in evaluation and memory beside the weights: batch {first.batch_size}, {first.device}."
    return Table(caption, header, rows, others, PUBLISHED)


def _class_table(comparison: Comparison, convention: str, metric: str, published: Sequence[Published]) -> Table:
    column = Metrics._fields.index(metric)
    unit, scale = _unit(comparison, convention, metric)
    rows = []
    for method, scores in comparison.scores.items():
        spread = scores.spread(convention)
        cells = [_spread(spread, c, column, scale) for c in range(len(comparison.class_names))]
        rows.append([_marked(method, scores.selected_on), *cells])
    fit = [p for p in published if len(p.classes) == len(comparison.class_names)]
    others = [[p.method, *map(_number, p.classes)] for p in fit]
    caption = f"{comparison.title}, {convention} convention, {_METRIC_NAMES[metric]} [{unit}] of each class: {SPREAD}."
    return Table(caption, ["method", *comparison.class_names], rows, others, PUBLISHED)


def _tests_table(comparison: Comparison, tests: Sequence[PairedTest]) -> Table:
    """List the tests of one metric and convention."""
    unit, scale = _unit(comparison, tests[0].convention, tests[0].metric)
    metric, points = _METRIC_NAMES[tests[0].metric], "points" if unit == "%" else unit
    rows = []
    for t in tests:
        median = "-" if math.isnan(t.median) else f"{scale * t.median:+.2f}"
        rows.append([t.first, t.second, str(t.shared), str(t.left_out), median, _p(t.p), _p(t.holm), t.note])
    caption = f"{comparison.title}, {tests[0].convention} convention, paired tests of {metric}."
    header = [
        "first",
        "second",
        "cases",
        "left out",
        f"median of first - second [{points}]",
        "p",
        "p, Holm",
        "why no p",
    ]
    return Table(caption, header, rows)


def _measured_rows(comparison: Comparison, costs: Mapping[tuple[str, str], Cost]) -> Iterable[dict[str, object]]:
    for name, scores in comparison.scores.items():
        cost = costs.get((comparison.dataset, name))
        common = {
            "dataset": comparison.dataset, "split": comparison.split, "source": "measured", "method": name,
            "chosen_on": scores.selected_on, "seeds": scores.num_seeds, "cases": len(scores.cases),
        }  # fmt: skip
        if cost is not None:
            common |= {
                "parameters": cost.parameters, "multiply_adds": int(cost.multiply_adds),
                "flops": int(2 * cost.multiply_adds), "images_per_second": cost.images_per_second,
                "peak_memory_bytes": cost.peak_memory, "device": cost.device, "batch_size": cost.batch_size or "",
            }  # fmt: skip
        for convention in CONVENTIONS:
            spread = scores.spread(convention)
            for c, class_name in enumerate((*comparison.class_names, "mean")):
                for i, metric in enumerate(Metrics._fields):
                    unit, scale = _unit(comparison, convention, metric)
                    numbers = [scale * values[c, i] for values in (spread.mean, spread.over_seeds, spread.over_cases)]
                    yield common | {
                        "convention": convention, "class": class_name, "metric": metric, "unit": unit,
                        "mean": numbers[0], "sd_over_seeds": numbers[1], "sd_over_cases": numbers[2],
                    }  # fmt: skip


def _published_rows(
    dataset: str, class_names: Sequence[str], published: Sequence[Published]
) -> Iterable[dict[str, object]]:
    for p in published:
        common = {
            "dataset": dataset, "split": "test", "source": "published", "method": p.method, "convention": "transunet",
            "parameters": 1e6 * p.parameters_m, "multiply_adds": 1e9 * p.gmacs, "flops": 2e9 * p.gmacs,
        }  # fmt: skip
        yield common | {"class": "mean", "metric": "dice", "unit": "%", "mean": p.dice}
        yield common | {"class": "mean", "metric": "hd95", "unit": "as printed", "mean": p.hd95}
        if len(p.classes) == len(class_names):
            for name, dice in zip(class_names, p.classes, strict=True):
                yield common | {"class": name, "metric": "dice", "unit": "%", "mean": dice}


def _unit(comparison: Comparison, convention: str, metric: str) -> tuple[str, float]:
    """Give a metric's unit and the factor that leads to it."""
    return ("%", 100.0) if metric in ("dice", "jaccard") else (comparison.distance_unit(convention), 1.0)


def _marked(name: str, selected_on: str) -> str:
    return f"{name} {CHOSEN_ON_TEST}" if selected_on == "test" else name


def _spread(spread, row: int, column: int, scale: float) -> str:
    mean, seeds, cases = (scale * values[row, column] for values in (spread.mean, spread.over_seeds, spread.over_cases))
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}{'' if math.isnan(seeds) else f' ± {seeds:.2f}'} ({_number(cases)})"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
