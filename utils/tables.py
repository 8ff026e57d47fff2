"""Tables of text as Markdown and LaTeX; `utils.html_page` has them as HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "[": "{[}", "]": "{]}",  # at the start of a row, after \\, a bracket would be an option
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A header and rows of cells as text, and rows of other people's numbers that are set apart under a heading.

    caption: what the numbers are, before the table; its first sentence names it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    published: Sequence[Sequence[str]] = field(default=())
    published_heading: str = ""

    def __post_init__(self) -> None:
        for row in (*self.rows, *self.published):
            if len(row) != len(self.header):
                raise ValueError(f"a row of {len(row)} cells under a header of {len(self.header)}: {row}")


def markdown(table: Table) -> str:
    """Return a table as Markdown, the caption as a paragraph before it; published rows follow a row that says so."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    cells = [[text if text == "---" else escape_markdown(text) for text in line] for line in lines]
    if table.published:
        cells.append([f"**{escape_markdown(table.published_heading)}**", *[""] * (len(table.header) - 1)])
        for name, *numbers in table.published:
            cells.append([f"*{escape_markdown(name)} (published)*", *map(escape_markdown, numbers)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{escape_markdown(table.caption)}\n\n{rows}\n"


def latex(table: Table) -> str:
    """Return a table as LaTeX for the packages booktabs and graphicx, which shrinks it to the text's width.

    Published rows follow a rule and a line that says so.
    """
    width = len(table.header)
    lines = [_latex_row(table.header), r"\midrule", *map(_latex_row, table.rows)]
    if table.published:
        heading = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(table.published_heading)}}}}} \\"
        lines += [r"\midrule", heading, *(_latex_row([f"{row[0]} (published)", *row[1:]]) for row in table.published)]
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(table.caption)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}}",
            r"\end{table}", "",
        ]
    )  # fmt: skip


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line; an underscore inside a word needs nothing."""
    return re.sub(r"([\\`*<>|&$]|\](?=[(\[])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + r" \\"
