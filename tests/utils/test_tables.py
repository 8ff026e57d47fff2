"""Tables keep their shape and their text whatever is in them, and published rows are never mixed with the others."""

import re

import pytest

from utils.tables import Table, escape_latex, latex, markdown

HOSTILE = r"a|b & 100 % $x_1$ {_y_} #2 ~^ \end{table} <b> *c* [d](e)" + "\nnext"


@pytest.fixture
def table() -> Table:
    rows = [["ours", "1.00 ± 0.10 (2.00)"], [HOSTILE, "-"]]
    return Table("Dice of 2_methods.", ["method", "Dice [%]"], rows, [["U-Net", "76.85"]], "published, not measured")


def unescaped_bars(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_markdown_has_one_line_a_row_and_published_rows_last(table):
    caption, _, *lines = markdown(table).rstrip("\n").split("\n")
    assert caption == "Dice of 2_methods."
    assert [unescaped_bars(line) for line in lines] == [3] * 6
    assert lines[1] == "| --- | --- |"
    assert "published, not measured" in lines[-2]
    assert lines[-1] == "| *U-Net (published)* | 76.85 |"
    assert "published" not in "".join(lines[:-2])


def test_markdown_shows_text_as_it_is(table):
    line = markdown(table).split("\n")[5]
    assert r"\<b\> \*c\*" in line and not re.findall(r"(?<!\\)([<>*$`&]|\]\()", line)
    assert "sim_mpnet" in markdown(Table("-", ["sim_mpnet"], []))


def test_latex_has_as_many_columns_everywhere_and_published_rows_behind_a_rule(table):
    text = latex(table)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1, 1, 1, 0, 1]
    assert r"\multicolumn{2}{l}{\textit{published, not measured}}" in rows[3]
    assert body.rindex(r"\midrule") < body.index("U-Net (published)")
    assert r"\begin{tabular}{lr}" in text and r"1.00 $\pm$ 0.10" in text
    assert text.count(r"\end{table}") == 1


def test_latex_sets_every_special_character_as_itself():
    assert escape_latex(r"&%$#_{}") == r"\&\%\$\#\_\{\}"
    assert escape_latex("[1]") == "{[}1{]}"  # after a row's end a bracket would be an option
    assert escape_latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 cells under a header of 2"):
        Table("-", ["a", "b"], [["1", "2", "3"]])
