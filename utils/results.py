"""Results as tables: the only writer of Markdown tables."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NUMBER = re.compile(r"[-+]?\.?\d.*|-?|nan")


def markdown(frame: "pd.DataFrame", floatfmt: str = "g", index: bool = False, **options) -> str:
    """Return a table as Markdown, columns of numbers to the right and of text to the left.

    Text stays as it is ("84.10" is not shortened), except that `|` is escaped and line breaks become blanks.

    Args:
        frame: with column names that are text.
        floatfmt: format of every float; NaN is written as "-".
        index: write the index as the first column, or leave it out.
        options: of `DataFrame.to_markdown`, such as `colalign`.
    """

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if value != value else format(value, floatfmt)
        return " ".join(str(value).split()).replace("|", r"\|")

    cells = (frame.reset_index() if index else frame).map(cell).rename(columns=cell)
    align = ["right" if cells.iloc[:, i].map(NUMBER.fullmatch).notna().all() else "left" for i in range(cells.shape[1])]
    return cells.to_markdown(index=False, **{"colalign": align, "disable_numparse": True, **options})
