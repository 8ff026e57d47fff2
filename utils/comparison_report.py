"""Lay comparisons out as tables, and write them as CSV, Markdown, LaTeX and one HTML page."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from datasets import DATASETS
from datasets.files import atomic_write
from utils.comparison import MEAN, NAMES, TESTED, Comparison, Run, by_method, differing_settings
from utils.metrics import MISSED, SPURIOUS
from utils.results import CONVENTIONS, OPTIMISTIC, markdown

PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "published_results.csv"
CSV_COLUMNS = (
    "dataset split source method chosen_on seeds cases convention class metric unit mean sd_over_seeds sd_over_cases "
    "parameters multiply_adds flops"
).split()


@dataclass
class Section:
    """One part of the page: notes, below them tables of text by their caption, and pictures with their caption."""

    heading: str
    notes: list[str]
    tables: dict[str, pd.DataFrame]
    pictures: dict[Path, str]


def score_rows(comparison: Comparison, costs: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """Return the scores of a comparison as rows of `comparison.csv`.

    costs: parameters, and multiply-adds of one image, of those methods where they are known.
    """
    rows = comparison.scores()
    for i, column in enumerate(("parameters", "multiply_adds")):
        rows[column] = rows["method"].map({method: cost[i] for method, cost in costs.items()}).astype(float)
    return rows.assign(dataset=comparison.dataset, split=comparison.split, source="measured")


def published_rows(comparison: Comparison) -> pd.DataFrame:
    """Return the published means as printed, and Dice of each class if it was printed.

    There are none unless all runs were tested on the data set's own test list and classes.
    """
    info = DATASETS[comparison.dataset]
    lists = [run.args.get("list_dir", info.list_dir) for runs in comparison.methods.values() for run in runs]
    own = all(Path(folder).resolve() == Path(info.list_dir).resolve() for folder in lists)
    if not own or comparison.split != info.splits[-1] or comparison.class_names != info.class_names:
        return pd.DataFrame()
    names = {"dsc": (MEAN, "dice", "%"), "hd95": (MEAN, "hd95", "as printed")}
    names |= {f"class{i}": (name, "dice", "%") for i, name in enumerate(info.class_names, 1)}
    rows = pd.read_csv(PUBLISHED).query("dataset == @info.name")
    rows = rows.melt(["dataset", "method", "params_m", "gmacs"], list(names), value_name="mean").dropna(subset="mean")
    rows[["class", "metric", "unit"]] = rows["variable"].map(names).tolist()
    sizes = {"parameters": 1e6 * rows["params_m"], "multiply_adds": 1e9 * rows["gmacs"]}
    return rows.assign(**sizes, split=comparison.split, source="published", convention="transunet")


def score_tables(comparison: Comparison, rows: pd.DataFrame, tests: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return for each convention the means, Dice and HD95 of each class, and the paired tests, by their caption.

    rows: those of `score_rows`, and those of `published_rows` if they are to stand below.
    """
    marks = rows["source"].replace({"measured": "", "published": " (published)"})
    marks += rows["chosen_on"].map({"test": " *"}).fillna("")
    deviations = _text(rows["sd_over_seeds"], " ± {:.2f}", "") + _text(rows["sd_over_cases"], " ({:.2f})", "")
    rows = rows.assign(method=rows["method"] + marks, text=_text(rows["mean"], "{:.2f}") + deviations)
    tables = {}
    for convention, part in rows.groupby("convention", sort=False):
        where = f"{comparison.title}, {convention} convention"
        units = part.drop_duplicates("metric").set_index("metric")["unit"]
        headings = {metric: f"{name} [{units[metric]}]" for metric, name in NAMES.items()}
        means, classes = part[part["class"] == MEAN], part[part["class"] != MEAN]
        facts = means.drop_duplicates("method").set_index("method")
        table = pd.DataFrame({name: _text(facts[name], "{:.0f}") for name in ("seeds", "cases")})
        if convention == "strict":
            for state in (MISSED, SPURIOUS):
                table[f"{state} per seed"] = _text(facts[state], "{:.3g}")
        table["parameters [M]"] = _text(facts["parameters"] / 1e6, "{:.2f}")
        table["multiply-adds [G]"] = _text(facts["multiply_adds"] / 1e9, "{:.2f}")
        scores = means.pivot(index="method", columns="metric", values="text")
        table[list(headings.values())] = scores.reindex(index=table.index, columns=list(NAMES)).fillna("-")
        tables[f"{where}, means over classes."] = table.reset_index()
        for metric in TESTED if len(comparison.class_names) > 1 else ():
            table = classes[classes["metric"] == metric].pivot(index="method", columns="class", values="text")
            table = table.reindex(index=facts.index.intersection(table.index), columns=list(comparison.class_names))
            tables[f"{where}, {headings[metric]} of each class."] = table.reset_index()
        for metric in TESTED if len(tests) else ():
            family = tests[(tests["convention"] == convention) & (tests["metric"] == metric)]
            table = family[["first", "second", "shared_cases", "left_out_cases"]]
            table = table.set_axis(["first", "second", "cases", "left out"], axis=1)
            unit = family["unit"].iloc[0].replace("%", "points")
            table[f"median of first - second [{unit}]"] = _text(family["median_difference"], "{:+.2f}")
            for column, name in (("p", "p"), ("p_holm", "p, Holm")):
                table[name] = _text(family[column], "{:.4f}").mask(family[column] < 1e-4, "< 0.0001")
            table["why no p"] = family["note"]
            tables[f"{where}, paired tests of {NAMES[metric]}."] = table
    return tables


def _text(numbers: pd.Series, form: str, unknown: str = "-") -> pd.Series:
    return numbers.map(lambda number: unknown if pd.isna(number) else form.format(number))


def run_tables(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """Return a table of the runs, and one of the settings in which the methods differ, by their caption."""
    rows = [(run.method, str(run.args.get("seed", "-")), str(run.folder)) for run in runs]
    tables = {"The runs.": pd.DataFrame(rows, columns=["method", "seed", "run folder"])}
    settings = pd.DataFrame({name: members[0].settings for name, members in by_method(runs).items()})
    if differing := differing_settings([members[0] for members in by_method(runs).values()]):
        settings = settings.loc[differing].fillna("-").rename_axis("argument").reset_index()
        tables["Training arguments in which the methods differ."] = settings
    return tables


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
        said.append(f"Methods marked with *: {OPTIMISTIC}")
    if rows["cases"].nunique() > 1:
        said.append("Not all methods were tested on the same cases, so their means are not over the same cases.")
    if (rows["source"] == "published").any():
        said.append("(published): not measured here, but printed in the paper's tables of its test split; in no test.")
    return said


def write_csv(folder: Path, rows: Sequence[pd.DataFrame], tests: Sequence[pd.DataFrame]) -> None:
    """Write `comparison.csv` and `paired_tests.csv`; Dice and Jaccard are in percent, unknown cells are empty."""
    scores = pd.concat(rows, ignore_index=True).assign(flops=lambda table: 2 * table["multiply_adds"])[CSV_COLUMNS]
    counts = ["seeds", "cases", "parameters", "multiply_adds", "flops"]
    scores[counts] = scores[counts].astype(float).round().astype("Int64")
    for name, frame in (("comparison", scores), ("paired_tests", pd.concat(tests))):
        with atomic_write(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")


def write_pages(folder: Path, sections: Sequence[Section]) -> None:
    """Write the sections as `comparison.md` and `comparison.html`, and their tables as `comparison.tex`."""
    from jinja2 import Environment, FileSystemLoader

    text, tex = ["# Comparison of runs"], ["% needs the packages booktabs and graphicx, and fontenc with T1"]
    for section in sections:
        text += [f"## {section.heading}", *section.notes]
        for caption, table in section.tables.items():
            text += [caption, markdown(table)]
            tex.append(_latex(caption, table))
        for path, caption in section.pictures.items():
            text += [f"![figure]({path.relative_to(folder).as_posix()})", caption]
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    with pd.option_context("display.max_colwidth", None):  # pandas would cut long cells
        page = pages.get_template("comparison.html.j2").render(title="Comparison of runs", sections=sections)
    for ending, content in (("md", "\n\n".join(text) + "\n"), ("tex", "\n".join(tex)), ("html", page)):
        with atomic_write(folder / f"comparison.{ending}") as temporary:
            temporary.write_text(content, encoding="utf-8")


def _latex(caption: str, table: pd.DataFrame) -> str:
    """Return a table as LaTeX, shrunk to the width of the text."""
    cells = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    caption = re.sub(r"([&%$#_{}])", r"\\\1", caption)
    shrunk = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    tabular = cells.to_latex(hrules=True).strip()
    return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{shrunk}\n{tabular}}}\n\\end{{table}}\n"
