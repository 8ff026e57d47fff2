"""Means, cases.csv, summary.json and printed tables say what the scores are, as they did in the first version."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils.errors import RunError
from utils.evaluation import CaseResult
from utils.metrics import ClassResult, Metrics, case_metrics
from utils.results import (
    case_table,
    format_summary,
    markdown,
    read_cases,
    summarise,
    write_csv,
    write_summary,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "results"
"""cases.csv and summary.json of five made-up cases, written by revision 2c5fbf2, one of volumes and one of images."""
CONFUSIONS = {
    "mm": None,
    "pixels": np.array([[8362, 171, 60, 228], [145, 126, 7, 22], [79, 5, 436, 9], [110, 32, 28, 180]]),
}
NAMES = ("box", "core", "nowhere")


def box_label() -> np.ndarray:
    label = np.zeros((5, 24, 32), np.uint8)
    label[1:4, 4:20, 6:26] = 1
    label[2:4, 8:16, 10:20] = 2
    return label


@pytest.fixture
def results() -> list[CaseResult]:
    """One perfect, one whose core is missed, one with a class that is not there."""
    label = box_label()
    extra = label.copy()
    extra[0, 0, 0:2] = 3
    seen = {"perfect": label, "missed": np.minimum(label, 1), "spurious": extra}
    return [CaseResult(name, "mm", case_metrics(p, label, 4, (2.0, 1.0, 1.0))) for name, p in seen.items()]


@pytest.mark.parametrize("kind", CONFUSIONS)
def test_figures_and_files_are_those_of_the_first_version(kind, tmp_path):
    table = read_cases(FIXTURES / f"{kind}.csv")
    write_csv(tmp_path / "cases.csv", table)
    assert (tmp_path / "cases.csv").read_bytes() == (FIXTURES / f"{kind}.csv").read_bytes()
    summary, expected = summarise(table, CONFUSIONS[kind]), json.loads((FIXTURES / f"{kind}.json").read_text())
    assert list(summary) == list(expected)
    for convention in ("transunet", "strict"):
        ours, theirs = summary.pop(convention), expected.pop(convention)
        assert list(ours) == list(theirs) and ours["unit"] == theirs["unit"]
        pairs = zip([*ours["classes"], ours["mean"]], [*theirs["classes"], theirs["mean"]], strict=True)
        assert all(list(a) == list(b) and a == pytest.approx(b, abs=1e-6) for a, b in pairs)
    for rows in ("thresholded_jaccard", "pooled"):
        for a, b in zip(summary.pop(rows, []), expected.pop(rows, []), strict=True):
            assert list(a) == list(b) and a == pytest.approx(b, abs=1e-6)
    assert summary == expected


def test_the_columns_of_cases_csv_stay(results, tmp_path):
    write_csv(tmp_path / "new" / "cases.csv", case_table(results, NAMES))
    header, *rows = (tmp_path / "new" / "cases.csv").read_text().splitlines()
    assert header == (
        "case,class,state,transunet_dice,transunet_hd95,transunet_jaccard,transunet_assd,"
        "strict_dice,strict_hd95,strict_jaccard,strict_assd,strict_unit,selected_on"
    )
    assert len(rows) == 9
    diagonal = f"{np.sqrt(1700):.6f}"
    zeros = ",".join(["0.000000"] * 4)
    assert rows[4] == f"missed,core,missed,{zeros},0.000000,{diagonal},0.000000,{diagonal},mm,val"
    assert rows[5] == f"missed,nowhere,absent,{zeros},,,,,mm,val"


def test_what_was_written_is_read_back(results, tmp_path):
    names = ("NA", "a, b", "c | d")
    table = case_table(results, names, "test")
    write_csv(tmp_path / "cases.csv", table)
    pd.testing.assert_frame_equal(read_cases(tmp_path / "cases.csv"), table, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("damage", ["cut", "row", "number", "empty", "column", "binary"])
def test_a_damaged_table_is_one_line_that_names_it(results, tmp_path, damage):
    path = tmp_path / "cases.csv"
    write_csv(path, case_table(results, NAMES))
    text = path.read_text()
    damaged = {
        "cut": text[:-40],
        "row": "\n".join(text.splitlines()[:-1]),
        "number": text.replace("found,1.", "found,one", 1),
        "empty": "",
        "column": text.replace("strict_hd95", "hd95"),
        "binary": "\x89PNG\r\n\xff\xfe",
    }[damage]
    path.write_bytes(damaged.encode("latin1"))
    with pytest.raises(RunError) as raised:
        read_cases(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_means_of_both_conventions(results):
    summary = summarise(case_table(results, NAMES))
    label = box_label()
    box_with_core = 2 * (label == 1).sum() / ((label == 1).sum() + (label > 0).sum())
    box = (1 + box_with_core + 1) / 3
    dice = {c: [row["dice"] for row in summary[c]["classes"]] for c in ("transunet", "strict")}
    assert dice["transunet"] == pytest.approx([box, 2 / 3, 1 / 3])
    assert dice["strict"] == pytest.approx([box, 2 / 3, 0])  # absent twice, spurious once
    assert summary["strict"]["mean"]["dice"] == pytest.approx((box + 2 / 3) / 3)
    diagonal = np.sqrt(10**2 + 24**2 + 32**2)
    assert [row["hd95"] for row in summary["strict"]["classes"]][1:] == pytest.approx([diagonal / 3, diagonal])
    assert [row["hd95"] for row in summary["transunet"]["classes"]][1:] == [0, 0]
    counts = {state: [row["cases"] for row in summary[state]] for state in ("missed", "spurious", "absent")}
    assert counts == {"missed": [0, 1, 0], "spurious": [0, 0, 1], "absent": [0, 0, 2]}
    assert (summary["strict"]["unit"], summary["transunet"]["unit"]) == ("mm", "voxels")


def test_a_class_that_is_never_there_is_left_out_of_the_strict_mean_only(results, tmp_path):
    summary = summarise(case_table(results[:1], NAMES))
    assert summary["strict"]["classes"][2] == {"class": "nowhere", **dict.fromkeys(Metrics._fields)}
    assert summary["strict"]["mean"] == {"dice": 1, "hd95": 0, "jaccard": 1, "assd": 0}
    assert summary["transunet"]["mean"]["dice"] == pytest.approx(2 / 3)
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    row = format_summary(summary).splitlines()[-2].split()
    assert row == ["nowhere", "-", "-", "-", "-", "0", "0", "1"]


def test_units_of_cases_with_and_without_a_spacing_are_both_named(results):
    perfect = ClassResult("found", Metrics(1, 0, 1, 0), Metrics(1, 0, 1, 0))
    table = case_table([results[0], CaseResult("other", "voxels", (perfect,) * 3)], NAMES)
    assert summarise(table)["strict"]["unit"] == "mm or voxels"


def test_the_printed_tables_are_aligned_and_labelled(results):
    transunet, strict = format_summary(summarise(case_table(results, NAMES))).split("\n\n")
    assert transunet.startswith("transunet convention, 3 cases") and strict.startswith("strict convention, 3 cases")
    assert "HD95 [voxels]" in transunet and "HD95 [mm]" in strict
    for block in (transunet, strict):
        lines = block.splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["class", *NAMES, "mean"]
        assert len({len(line) for line in lines}) == 1
    assert strict.splitlines()[3].split() == ["core", "66.67", "13.74", "66.67", "13.74", "1", "0", "0"]
    images = format_summary(summarise(read_cases(FIXTURES / "pixels.csv"), CONFUSIONS["pixels"]))
    for words in ("HD95 [pixels]", "Jaccard, 0 below 0.65 [%]", "over the pixels of all cases", "Sensitivity [%]"):
        assert words in images


def test_every_table_says_that_a_checkpoint_was_chosen_on_the_test_volumes(results):
    assert "test volumes" not in format_summary(summarise(case_table(results, NAMES)))
    table = case_table(results, NAMES, "test")
    assert set(table["selected_on"]) == {"test"} and summarise(table)["selected_on"] == "test"
    assert "test volumes" in format_summary(summarise(table)).splitlines()[0]


def test_markdown_aligns_numbers_to_the_right_and_escapes_bars():
    frame = pd.DataFrame({"class": ["a|b", "c\nd"], "Dice": [84.1, np.nan], "HD95": ["1.20 ± 0.3", "-"], "n": [1, 20]})
    lines = markdown(frame, floatfmt=".2f").splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["|", "a\\|b", "|", "84.10", "|", "1.20", "±", "0.3", "|", "1", "|"],
        ["|", "c", "d", "|", "-", "|", "-", "|", "20", "|"],
    ]
    assert [cell[-1] for cell in lines[1].strip("|").split("|")] == ["-", ":", ":", ":"]
    assert "index" in markdown(frame, index=True)
