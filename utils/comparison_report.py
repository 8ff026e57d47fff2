"""Show comparisons: tables, box plots and training curves, as CSV, Markdown, LaTeX and one HTML page."""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn
from matplotlib import pyplot, rc_context

from datasets.files import write_text
from utils.comparison import MEAN, NAMES, TESTED, Comparison, by_method
from utils.figures import save_figure
from utils.metrics import MISSED, SPURIOUS
from utils.results import CONVENTIONS, OPTIMISTIC, markdown
from utils.tested_runs import Run

PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "published_results.csv"
UNPUBLISHED_SPLITS = ("segpc", "isic")  # the paper does not say on which of their images it tests
LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
CSV_COLUMNS = [
    "dataset", "split", "source", "method", "chosen_on", "seeds", "cases", "convention", "class", "metric", "unit",
    "mean", "sd_over_seeds", "sd_over_cases",
]  # fmt: skip
"""Columns of comparison.csv. Dice and Jaccard are in percent; unknown cells are empty."""


def published_rows(comparison: Comparison) -> pd.DataFrame:
    """Return the published means and Dice of each class, as printed; empty if runs used other test data or lists."""
    info = comparison.info
    lists = set().union(*(run.lists for runs in comparison.methods.values() for run in runs))
    # A user's own data set, which has folds, may have the name of a known data set.
    own = lists == {Path(info.list_dir).resolve()} and info.fold is None
    if not own or comparison.split != info.splits[-1] or comparison.data != info.name:
        return pd.DataFrame()
    names = {"dsc": (MEAN, "dice", "%"), "hd95": (MEAN, "hd95", "as printed")}
    names |= {f"class{i}": (name, "dice", "%") for i, name in enumerate(info.class_names, 1)}
    rows = pd.read_csv(PUBLISHED).query("dataset == @info.name")
    rows = rows.melt(["dataset", "method"], list(names), value_name="mean").dropna()
    rows = rows.join(pd.DataFrame.from_dict(names, "index", columns=["class", "metric", "unit"]), on="variable")
    return rows.assign(split=comparison.split, source="published", convention="transunet")


def score_tables(comparison: Comparison, rows: pd.DataFrame, tests: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return tables by caption: means, Dice and HD95 of each class, paired tests. rows: scores and published rows."""
    marks = rows["source"].replace({"measured": "", "published": " (published)"})
    marks += rows["chosen_on"].map({"test": " *"}).fillna("")
    deviations = _text(rows["sd_over_seeds"], " ± {:.2f}", "") + _text(rows["sd_over_cases"], " ({:.2f})", "")
    rows = rows.assign(method=rows["method"] + marks, text=_text(rows["mean"], "{:.2f}") + deviations)
    tables = {}
    for convention, part in rows.groupby("convention", sort=False):
        where = f"{comparison.data}, {comparison.split}, {convention} convention"
        headings = {m: f"{NAMES[m]} [{unit}]" for m, unit in part.groupby("metric")["unit"].first().items()}
        cells = part.pivot(index="method", columns=["class", "metric"], values="text")
        facts = part.drop_duplicates("method").set_index("method")
        cells = cells.reindex(facts.index).fillna("-")
        table = pd.DataFrame({name: _text(facts[name], "{:.0f}") for name in ("seeds", "cases")})
        if convention == "strict":
            for state in (MISSED, SPURIOUS):
                table[f"{state} per seed"] = _text(facts[state], "{:.3g}")
        means = cells[MEAN][list(NAMES)].rename(columns=headings)
        tables[f"{where}, means over classes."] = table.join(means).reset_index()
        for metric in TESTED if len(comparison.class_names) > 1 else ():
            table = cells.xs(metric, axis=1, level="metric")[list(comparison.class_names)]
            table = table[(table != "-").any(axis=1)]
            tables[f"{where}, {headings[metric]} of each class."] = table.reset_index()
        for metric in TESTED if len(tests) else ():
            family = tests[(tests["convention"] == convention) & (tests["metric"] == metric)]
            unit = family["unit"].iloc[0].replace("%", "points")
            table = family[["first", "second", "shared_cases", "left_out_cases"]]
            table = table.set_axis(["first", "second", "cases", "left out"], axis=1)
            table[f"median of first - second [{unit}]"] = _text(family["median_difference"], "{:+.2f}")
            for column, name in (("p", "p"), ("p_holm", "p, Holm")):
                table[name] = _text(family[column], "{:.4f}").mask(family[column] < 1e-4, "< 0.0001")
            tables[f"{where}, paired tests of {NAMES[metric]}."] = table.assign(note=family["note"])
    return tables


def _text(numbers: pd.Series, form: str, unknown: str = "-") -> pd.Series:
    return numbers.map(lambda number: unknown if pd.isna(number) else form.format(number))


def run_tables(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """Return tables by caption: the runs, and the settings in which the methods differ."""
    columns = ["method", "seed", "fold", "tested", "run folder"]
    rows = [(r.method, str(r.args["seed"]), str(r.args.get("fold", "-")), r.tested, str(r.folder)) for r in runs]
    settings = pd.DataFrame({name: members[0].settings for name, members in by_method(runs).items()}).fillna("-")
    differing = settings[settings.nunique(axis=1) > 1].rename_axis("argument").reset_index()
    tables = {"The runs.": pd.DataFrame(rows, columns=columns)}
    return tables | ({"Training arguments in which the methods differ.": differing} if len(differing) else {})


def notes(comparison: Comparison, rows: pd.DataFrame) -> list[str]:
    """Return what is special about the scores of a comparison; rows: scores and published rows."""
    said = []
    if (rows["chosen_on"] == "test").any():
        said.append(f"Methods marked with *: {OPTIMISTIC}")
    if comparison.cases.groupby("method")["case"].agg(frozenset).nunique() > 1:
        said.append("Not all methods were tested on the same cases, so their means are not over the same cases.")
    if (rows["source"] == "published").any():
        said.append("(published): not measured here, but printed in the paper for its test split; in no paired test.")
        if comparison.data in UNPUBLISHED_SPLITS:
            said.append("The paper does not publish its split of this set, so its rows are means over other images.")
    return said


def palette(methods: Iterable[str]) -> dict[str, tuple[float, float, float]]:
    """Return a colour for each method, so that it has the same one in all figures of a page."""
    names = list(dict.fromkeys(methods))
    # "colorblind" suits colour-blind readers too, but repeats after ten colours.
    colours = seaborn.color_palette("colorblind" if len(names) <= 10 else "husl", len(names))
    return dict(zip(names, colours, strict=True))


def draw_boxes(path: Path, comparison: Comparison, colours: Mapping[str, Any]) -> dict[Path, str]:
    """Draw the strict Dice and HD95 of the cases, for each class and method, as boxes and dots; return the caption."""
    values = comparison.per_case().query("convention == 'strict' and `class` != @MEAN and metric in @TESTED").dropna()
    values = values.assign(metric=values["metric"].map(NAMES) + " [" + values["unit"] + "]")
    boxes = dict(x="class", y="value", col="metric", col_wrap=1, kind="boxen", aspect=3, sharey=False)
    return _draw(
        path, seaborn.catplot, values, boxes | {"palette": colours},
        f"{comparison.data}, {comparison.split}: Dice and HD95 of each class, strict convention, seeds averaged first. "
        "Lines are medians over cases, the widest boxes hold half of the cases, further boxes and dots the rest.",
    )  # fmt: skip


def draw_curves(path: Path, runs: Sequence[Run], colours: Mapping[str, Any]) -> dict[Path, str]:
    """Draw loss and validation Dice over the epochs, one line per run that has a `metrics.csv`; return the caption."""
    history = pd.concat([run.history.assign(method=run.method, run=str(run.folder)) for run in runs])
    history = history.reindex(columns=["method", "run", "epoch", "train_loss", "val_dice"])
    history = history.melt(["method", "run", "epoch"], var_name="metric").dropna()
    lines = dict(x="epoch", y="value", col="metric", kind="line", units="run", estimator=None, marker=".")
    return _draw(
        path, seaborn.relplot, history, lines | {"facet_kws": {"sharey": False}, "palette": colours},
        "Training loss, and the Dice in [0, 1] on which the best epoch is chosen, one line per run. Losses are "
        "comparable only between methods that are trained with the same loss.",
    )  # fmt: skip


def _draw(
    path: Path, plot: Callable[..., seaborn.FacetGrid], data: pd.DataFrame, style: dict[str, Any], caption: str
) -> dict[Path, str]:
    """Write a figure in the colours of the methods; return {path: caption}, or {} if there are no data."""
    if data.empty:
        return {}
    pyplot.switch_backend("agg")  # needs no display
    with rc_context({"text.parse_math": False}):  # a `$` in a name is not a formula
        grid = plot(data, hue="method", height=3.5, **style)
        save_figure(grid.set_titles("{col_name}").set_ylabels("").figure, path)
    pyplot.close(grid.figure)
    return {path: caption}


def write_pages(folder: Path, sections: Sequence[Mapping[str, Any]]) -> None:
    """Write the sections as `comparison.md` and `comparison.html`, and their tables as `comparison.tex`.

    A section has a `heading`, `notes`, `tables` by caption, and `figures`, which are captions by path.
    """
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    templates = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=templates, autoescape=select_autoescape(["html.j2"]), trim_blocks=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    pages.filters["latex"] = lambda text: re.sub(r"[\\^~&%$#_{}]", lambda m: LATEX.get(m[0], f"\\{m[0]}"), text)
    pages.filters["markdown"] = markdown
    for ending in ("html", "md", "tex"):
        with pd.option_context("display.max_colwidth", None):  # pandas would cut long cells
            page = pages.get_template(f"comparison.{ending}.j2").render(sections=sections, conventions=CONVENTIONS)
        write_text(folder / f"comparison.{ending}", page)
