"""The scores of test cases as tables: means over cases, cases.csv, summary.json, the printed summary, and Markdown.

Everything starts from one pandas table with one row per case and class, as in cases.csv (``COLUMNS``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.errors import brief, counted
from datasets.files import atomic_write
from utils.errors import RunError
from utils.metrics import ABSENT, MISSED, SPURIOUS, Metrics, pooled_metrics

if TYPE_CHECKING:
    import pandas as pd

    from utils.evaluation import CaseResult

CONVENTIONS = {
    "transunet": "as papers report it: a spurious class has Dice 100, a missed or absent one 0, all have distance 0",
    "strict": "a spurious or missed class has Dice 0 and the volume's diagonal as distance, an absent one is left out",
}
STATES = (MISSED, SPURIOUS, ABSENT)
METRICS = Metrics._fields
NUMBERS = [f"{convention}_{metric}" for convention in CONVENTIONS for metric in METRICS]
COLUMNS = ["case", "class", "state", *NUMBERS, "strict_unit", "selected_on"]
"""Columns of cases.csv. Dice and Jaccard are in [0, 1], `transunet` distances in voxels, `strict` in `strict_unit`."""

OPTIMISTIC = (
    "The checkpoint was chosen on the test volumes (--select test): its scores are optimistic. Compare them only with "
    "those of checkpoints chosen in the same way."
)
"""The first line of every table of a checkpoint that was chosen on test volumes."""

ISIC_THRESHOLD = 0.65
"""The ISIC challenge of 2018 (arXiv 1902.03368) counts a segmentation with a lower Jaccard as Jaccard 0."""


def case_table(results: Sequence["CaseResult"], class_names: Sequence[str], selected_on: str = "val") -> "pd.DataFrame":
    """Return the table with ``COLUMNS``, one row per case and class; scores that a convention leaves out are NaN.

    results: what ``evaluate`` returned; class_names: without background; selected_on: the cases that chose the
    checkpoint, ``val`` or ``test``.
    """
    import pandas as pd

    rows = [
        [result.name, name, c.state, *c.transunet, *c.strict, result.unit, selected_on]
        for result in results
        for name, c in zip(class_names, result.classes, strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def write_csv(path: str | Path, table: Any, float_format: str | None = "%.6f") -> None:
    """Write a case table, or rows for a pandas table, as CSV, NaN as an empty cell; float_format None: all digits."""
    import pandas as pd

    with atomic_write(path) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False, float_format=float_format, lineterminator="\r\n")


def read_cases(path: str | Path) -> "pd.DataFrame":
    """Read a case table that ``write_csv`` wrote; raise RunError if the file is of another kind or is cut off."""
    import pandas as pd

    types = {column: float if column in NUMBERS else str for column in COLUMNS}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values={column: [""] for column in NUMBERS})
        table = table[COLUMNS]
    except (KeyError, ValueError) as error:  # pandas' own errors are subclasses of these
        raise RunError(
            f"{path}: {brief(error)}; expected a table of a test script: test the checkpoint again"
        ) from error
    classes = table.groupby("case", sort=False)["class"].agg(tuple)
    if classes.nunique() != 1 or not table["selected_on"].isin(("val", "test")).all():
        raise RunError(f"{path}: is damaged; expected the same classes in each case, chosen on val or test: test again")
    return table


def summarise(table: "pd.DataFrame", confusion: np.ndarray | None = None) -> dict[str, Any]:
    """Return the content of summary.json: means over cases, then over classes, under both conventions.

    Means leave out NaN, the strict score of an absent class; the mean is None if all scores are NaN. confusion: for
    images, the sum of the ``confusion`` of all cases, (num_classes, num_classes). With it, the summary also has the
    scores over all pixels together and the ISIC challenge's mean thresholded Jaccard (strict).
    """
    import pandas as pd

    units = sorted(table["strict_unit"].unique())
    if len(units) > 1:  # mm and voxels have no common mean
        table = table.assign(strict_hd95=np.nan, strict_assd=np.nan)
    classes = table.groupby("class", sort=False)
    unit = {"transunet": "pixels" if units == ["pixels"] else "voxels", "strict": " or ".join(units)}
    summary: dict[str, Any] = {"num_cases": table["case"].nunique(), "selected_on": table["selected_on"].iloc[0]}
    for convention in CONVENTIONS:
        columns = {f"{convention}_{metric}": metric for metric in METRICS}
        means = classes[list(columns)].mean().rename(columns=columns)
        summary[convention] = {"unit": unit[convention], "mean": _plain(means.mean()), "classes": _rows(means)}
    for state in STATES:
        counts = (table["state"] == state).groupby(table["class"], sort=False).sum()
        summary[state] = [{"class": name, "cases": int(count)} for name, count in counts.items()]
    if confusion is not None:
        jaccard = table["strict_jaccard"].mask(table["strict_jaccard"] < ISIC_THRESHOLD, 0)
        thresholded = jaccard.groupby(table["class"], sort=False).mean().to_frame("mean")
        summary["thresholded_jaccard"] = _rows(thresholded)
        summary["pooled"] = _rows(pd.DataFrame(pooled_metrics(confusion), index=thresholded.index))
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """Return a summary as plain text, with one aligned table per convention and shares in percent."""
    blocks = [OPTIMISTIC] if summary["selected_on"] == "test" else []
    for convention, note in CONVENTIONS.items():
        unit = summary[convention]["unit"]
        table = _with_mean(summary[convention]["classes"])
        table[["dice", "jaccard"]] *= 100
        table.columns = ["Dice [%]", f"HD95 [{unit}]", "Jaccard [%]", f"ASSD [{unit}]"]
        if convention == "strict":
            for state in STATES:
                counts = [row["cases"] for row in summary[state]]
                table[state] = [*counts, sum(counts)]
            if "thresholded_jaccard" in summary:
                title = f"Jaccard, 0 below {ISIC_THRESHOLD} [%]"
                table[title] = 100 * _with_mean(summary["thresholded_jaccard"])["mean"]
        heading = f"{convention} convention, {counted(summary['num_cases'], 'case')} ({note})"
        blocks += [f"{heading}\n{markdown(table, '.2f', True, 'plain')}"]
    if "pooled" in summary:
        table = 100 * _with_mean(summary["pooled"])
        table.columns = [f"{name.capitalize()} [%]" for name in table]
        blocks += [f"over the pixels of all cases together\n{markdown(table, '.2f', True, 'plain')}"]
    return "\n\n".join(blocks)


def markdown(frame: "pd.DataFrame", floatfmt: str = "g", index: bool = False, tablefmt: str = "pipe") -> str:
    """Return a table as Markdown; the first column is aligned to the left, the others to the right.

    Text stays as it is ("84.10" is not shortened), but in Markdown ``|`` is escaped, and line breaks become spaces. NaN
    is "-". index: write the index as first column; tablefmt: format of tabulate, such as ``plain`` for a terminal.
    """

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if np.isnan(value) else format(value, floatfmt)
        text = " ".join(str(value).split())
        return text.replace("|", r"\|") if tablefmt == "pipe" else text

    cells = (frame.reset_index() if index else frame).map(cell).rename(columns=cell)
    align = ["left", *["right"] * (len(cells.columns) - 1)]
    return cells.to_markdown(index=False, colalign=align, disable_numparse=True, tablefmt=tablefmt)


def _with_mean(rows: list[dict[str, Any]]) -> "pd.DataFrame":
    """Return the numbers of classes as floats, indexed by class, and their mean over classes as the last row."""
    import pandas as pd

    table = pd.DataFrame(rows).set_index("class").astype(float)
    return pd.concat([table, table.mean().to_frame("mean").T]).rename_axis("class")


def _rows(table: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{"class": name, **_plain(row)} for name, row in table.iterrows()]


def _plain(numbers: Any) -> dict[str, float | None]:
    return {name: None if np.isnan(x) else float(x) for name, x in numbers.items()}
