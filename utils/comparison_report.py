"""Lay comparisons out as tables, and write them as CSV, Markdown, LaTeX and one HTML page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from datasets import DATASETS
from datasets.files import atomic_write
from utils.comparison import MEAN, NAMES, TESTED, Comparison, Method, differing_settings
from utils.comparison_figures import Drawing
from utils.metrics import MISSED, SPURIOUS
from utils.results import CONVENTIONS, OPTIMISTIC, markdown

PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "published_results.csv"
CHOSEN_ON_TEST = "*"
"""Follows the name of a method whose checkpoint was chosen on the test volumes."""
COLUMNS = (
    "dataset split source method chosen_on seeds cases convention class metric unit mean sd_over_seeds sd_over_cases "
    "parameters multiply_adds flops"
).split()
"""Columns of `comparison.csv`."""
Cost = tuple[int, int]
"""Parameters, and multiply-adds of one image."""


@dataclass(frozen=True)
class Table:
    """Cells as text, and a caption that says what they are."""

    caption: str
    frame: pd.DataFrame

    def latex(self) -> str:
        """Return the table as LaTeX, shrunk to the width of the text."""
        cells = self.frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        tabular = cells.to_latex(hrules=True).strip()
        caption = re.sub(r"([&%$#_{}])", r"\\\1", self.caption)
        shrunk = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
        return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{shrunk}\n{tabular}}}\n\\end{{table}}\n"

    def html(self) -> str:
        """Return the table as HTML, with the text escaped."""
        with pd.option_context("display.max_colwidth", None):  # pandas would cut long cells
            return self.frame.to_html(index=False, border=0)


@dataclass
class Section:
    """One part of the page: notes, tables below them, pictures at the end."""

    heading: str
    notes: list[str]
    tables: list[Table]
    pictures: list[Drawing]


def score_rows(comparison: Comparison, costs: Mapping[str, Cost]) -> pd.DataFrame:
    """Return the scores of a comparison as rows of `comparison.csv`, with missed and spurious classes per seed.

    costs: by method, where they are known.
    """
    cases = comparison.cases
    on_test = set(cases["method"][cases["selected_on"] == "test"])
    once = cases[(cases["convention"] == "strict") & (cases["metric"] == "dice")].groupby("method")
    facts = pd.DataFrame({"seeds": once["run"].nunique(), "cases": once["case"].nunique()})
    facts["chosen_on"] = ["test" if method in on_test else "val" for method in facts.index]
    for state in (MISSED, SPURIOUS):
        facts[state] = once["state"].agg(list).map(lambda states, state=state: states.count(state)) / facts["seeds"]
    facts[["parameters", "multiply_adds"]] = [costs.get(method, (np.nan, np.nan)) for method in facts.index]
    rows = comparison.scores().merge(facts, left_on="method", right_index=True)
    return rows.assign(dataset=comparison.dataset, split=comparison.split, source="measured")


def published_rows(dataset: str, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the published rows of a data set: means as printed, and Dice of each class if all were printed."""
    rows = pd.read_csv(PUBLISHED).query("dataset == @dataset")
    printed = [column for column in rows if column.startswith("class") and rows[column].notna().any()]
    classes = dict(zip(printed, class_names, strict=True)) if len(printed) == len(class_names) else {}
    rows = rows.melt(["method", "params_m", "gmacs"], ["dsc", "hd95", *classes], var_name="class", value_name="mean")
    is_hd95 = rows["class"] == "hd95"
    return rows.assign(
        **{"class": rows["class"].replace({"dsc": MEAN, "hd95": MEAN} | classes)},
        metric=is_hd95.map({True: "hd95", False: "dice"}),
        unit=is_hd95.map({True: "as printed", False: "%"}),
        parameters=1e6 * rows["params_m"],
        multiply_adds=1e9 * rows["gmacs"],
        dataset=dataset,
        split="test",
        source="published",
        convention="transunet",
    )


def beside_published(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparison of each data set that gets the published rows: of its test split, or the nearest to it.

    All its runs must have the data set's own lists, so that the published rows are of similar cases.
    """
    best: dict[str, tuple[int, Comparison]] = {}
    for comparison in comparisons:
        splits = DATASETS[comparison.dataset].splits
        rank = splits.index(comparison.split) if comparison.split in splits else -1
        if comparison.dataset not in best or rank > best[comparison.dataset][0]:
            best[comparison.dataset] = rank, comparison
    return [comparison for _, comparison in best.values() if _has_own_lists(comparison)]


def score_tables(comparison: Comparison, rows: pd.DataFrame, tests: pd.DataFrame) -> list[Table]:
    """Return for each convention the means, Dice and HD95 of each class, and the paired tests.

    rows: those of `score_rows`, and `published_rows` if they are to stand below.
    """
    published = rows["source"] == "published"
    names = rows["method"].mask(published, rows["method"] + " (published)")
    rows = rows.assign(method=names.mask(rows["chosen_on"] == "test", names + f" {CHOSEN_ON_TEST}"))
    rows["text"] = rows.apply(_cell, axis=1)
    tables = []
    for convention, of_convention in rows.groupby("convention", sort=False):
        where = f"{comparison.title}, {convention} convention"
        units = of_convention.drop_duplicates("metric").set_index("metric")["unit"]
        means = of_convention[of_convention["class"] == MEAN]
        facts = means.drop_duplicates("method").set_index("method")
        shown = {"seeds": _text(facts["seeds"], ".0f"), "cases": _text(facts["cases"], ".0f")}
        if convention == "strict":
            shown |= {f"{state} per seed": _text(facts[state], ".3g") for state in (MISSED, SPURIOUS)}
        shown["parameters [M]"] = _text(facts["parameters"] / 1e6, ".2f")
        shown["multiply-adds [G]"] = _text(facts["multiply_adds"] / 1e9, ".2f")
        for metric, name in NAMES.items():
            shown[f"{name} [{units[metric]}]"] = means[means["metric"] == metric].set_index("method")["text"]
        frame = pd.DataFrame(shown).fillna("-").loc[facts.index].reset_index()
        tables.append(Table(f"{where}, means over classes.", frame))
        for metric in TESTED if len(comparison.class_names) > 1 else ():
            frame = of_convention[of_convention["metric"] == metric].pivot(
                index="method", columns="class", values="text"
            )
            frame = frame.reindex(facts.index)[list(comparison.class_names)].dropna().reset_index()
            tables.append(Table(f"{where}, {NAMES[metric]} [{units[metric]}] of each class.", frame))
        for metric in TESTED if len(tests) else ():
            family = tests[(tests["convention"] == convention) & (tests["metric"] == metric)]
            tables.append(Table(f"{where}, paired tests of {NAMES[metric]}.", _tests_frame(family)))
    return tables


def runs_table(methods: Sequence[Method]) -> Table:
    """List the runs of each method."""
    rows = [(method.name, str(run.args.get("seed", "-")), str(run.folder)) for method in methods for run in method.runs]
    return Table("The runs.", pd.DataFrame(rows, columns=["method", "seed", "run folder"]))


def settings_table(methods: Sequence[Method]) -> Table:
    """List the settings in which the methods differ, with one column per method."""
    settings = [method.runs[0].settings for method in methods]
    names = differing_settings([method.runs[0] for method in methods])
    rows = [[name, *(str(own.get(name, "-")) for own in settings)] for name in names]
    columns = ["argument", *(method.name for method in methods)]
    return Table("Training arguments in which the methods differ.", pd.DataFrame(rows, columns=columns))


def notes(rows: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """Return what a reader of the tables must know. rows, tests: those of `score_tables`."""
    said = [
        "Cells: mean ± standard deviation (SD) over seeds (SD over cases). Means are over cases, then over classes, "
        "then over seeds; the SD over cases is taken after averaging seeds. A multiply-add is two FLOPs.",
        *(f"Convention {name}: {meaning}." for name, meaning in CONVENTIONS.items()),
    ]
    if len(tests):
        said.append(
            "Paired tests: Wilcoxon's signed-rank test, two-sided, over the cases of both methods (averaged over "
            "classes and seeds), corrected by Holm over the pairs of a table. They do not say what another seed gives."
        )
    if (rows["chosen_on"] == "test").any():
        said.append(f"Methods marked with {CHOSEN_ON_TEST}: {OPTIMISTIC}")
    if rows["cases"].nunique() > 1:
        said.append("Not all methods were tested on the same cases, so their means are not over the same cases.")
    if (rows["source"] == "published").any():
        said.append("(published): not measured here, but printed in the paper's tables of its test split; in no test.")
    return said


def write_csv(folder: Path, rows: Sequence[pd.DataFrame], tests: Sequence[pd.DataFrame]) -> None:
    """Write `comparison.csv` and `paired_tests.csv`; Dice and Jaccard are in percent, unknown cells are empty."""
    scores = pd.concat([part.reindex(columns=COLUMNS) for part in rows], ignore_index=True)
    scores["flops"] = 2 * scores["multiply_adds"]
    whole = ["seeds", "cases", "parameters", "multiply_adds", "flops"]
    scores[whole] = scores[whole].astype(float).round().astype("Int64")
    for name, frame in (("comparison", scores), ("paired_tests", pd.concat(tests, ignore_index=True))):
        with atomic_write(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")


def write_pages(folder: Path, sections: Sequence[Section]) -> None:
    """Write the sections as `comparison.md` and `comparison.html`, and their tables as `comparison.tex`."""
    from jinja2 import Environment, FileSystemLoader

    text, tex = ["# Comparison of runs"], ["% needs the packages booktabs and graphicx, and fontenc with T1"]
    for section in sections:
        text += [f"## {section.heading}", *section.notes]
        for table in section.tables:
            text += [table.caption, markdown(table.frame)]
            tex.append(table.latex())
        for picture in section.pictures:
            text += [f"![figure]({picture.path.relative_to(folder).as_posix()})", picture.caption]
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = pages.get_template("comparison.html.j2").render(title="Comparison of runs", sections=sections)
    for ending, content in (("md", "\n\n".join(text) + "\n"), ("tex", "\n".join(tex)), ("html", page)):
        with atomic_write(folder / f"comparison.{ending}") as temporary:
            temporary.write_text(content, encoding="utf-8")


def _has_own_lists(comparison: Comparison) -> bool:
    own = DATASETS[comparison.dataset].list_dir
    runs = [run for method in comparison.methods.values() for run in method.runs]
    return all(Path(run.args.get("list_dir", own)).resolve() == Path(own).resolve() for run in runs)


def _tests_frame(tests: pd.DataFrame) -> pd.DataFrame:
    unit = tests["unit"].iloc[0].replace("%", "points")
    p = {name: _text(tests[name], ".4f").mask(tests[name] < 1e-4, "< 0.0001") for name in ("p", "p_holm")}
    shown = {"first": tests["first"], "second": tests["second"], "cases": tests["shared_cases"]}
    shown |= {"left out": tests["left_out_cases"]}
    shown |= {f"median of first - second [{unit}]": _text(tests["median_difference"], "+.2f")}
    return pd.DataFrame(shown | {"p": p["p"], "p, Holm": p["p_holm"], "why no p": tests["note"]})


def _text(numbers: pd.Series, format_spec: str) -> pd.Series:
    return numbers.map(lambda number: "-" if number != number else format(number, format_spec))


def _cell(row: pd.Series) -> str:
    """Return "mean ± SD over seeds (SD over cases)", without what is not known."""
    if np.isnan(row["mean"]):
        return "-"
    seeds = "" if np.isnan(row["sd_over_seeds"]) else f" ± {row['sd_over_seeds']:.2f}"
    cases = "" if np.isnan(row["sd_over_cases"]) else f" ({row['sd_over_cases']:.2f})"
    return f"{row['mean']:.2f}{seeds}{cases}"
