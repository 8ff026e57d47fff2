"""Means, cases.csv, summary.json and printed tables say what the scores are, as they did in the first version."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.utils.test_evaluation import NAMES, box_label, predictions
from utils.evaluation import CaseResult
from utils.metrics import Metrics, case_metrics
from utils.results import case_table, format_summary, markdown, read_cases, summarise, write_csv

FIXTURES = Path(__file__).parents[1] / "fixtures" / "results"
"""cases.csv and summary.json of five made-up cases, written by revision 2c5fbf2, one of volumes and one of images."""
CONFUSION = np.array([[8362, 171, 60, 228], [145, 126, 7, 22], [79, 5, 436, 9], [110, 32, 28, 180]])  # of the images


@pytest.fixture
def results() -> list[CaseResult]:
    return [CaseResult(name, "mm", case_metrics(p, box_label(), 4, (2, 1, 1))) for name, p in predictions().items()]


@pytest.mark.parametrize(("kind", "confusion"), [("mm", None), ("pixels", CONFUSION)])
def test_figures_and_files_are_those_of_the_first_version(kind, confusion, tmp_path):
    table = read_cases(FIXTURES / f"{kind}.csv")
    write_csv(tmp_path / "cases.csv", table)
    assert (tmp_path / "cases.csv").read_bytes() == (FIXTURES / f"{kind}.csv").read_bytes()
    summary, expected = summarise(table, confusion), json.loads((FIXTURES / f"{kind}.json").read_text())
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


def test_what_was_written_is_read_back(results, tmp_path):
    table = case_table(results, ("NA", "a, b", "c | d"), "test")
    write_csv(tmp_path / "cases.csv", table)
    pd.testing.assert_frame_equal(read_cases(tmp_path / "cases.csv"), table, atol=1e-6, check_dtype=False)
    summary = summarise(table)
    assert summary["selected_on"] == "test" and "test volumes" in format_summary(summary).splitlines()[0]
    table.loc[0, "strict_unit"] = "voxels"
    assert summarise(table)["strict"]["unit"] == "mm or voxels"


def test_a_class_that_is_never_there_is_left_out_of_the_strict_mean_only(results):
    summary = summarise(case_table(results[:1], NAMES))
    assert summary["strict"]["classes"][2] == {"class": "nowhere", **dict.fromkeys(Metrics._fields)}
    assert summary["strict"]["mean"] == {"dice": 1, "hd95": 0, "jaccard": 1, "assd": 0}
    assert summary["transunet"]["mean"]["dice"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert format_summary(summary).splitlines()[-2].split() == "nowhere - - - - 0 0 1".split()


def test_markdown_aligns_numbers_to_the_right_and_escapes_bars():
    frame = pd.DataFrame({"class": ["a|b", "c\nd"], "Dice": [84.1, np.nan], "HD95": ["1.20 ± 0.3", "-"], "n": [1, 20]})
    _, rule, *rows = markdown(frame, floatfmt=".2f").splitlines()
    assert [re.sub(" +", " ", row) for row in rows] == ["| a\\|b | 84.10 | 1.20 ± 0.3 | 1 |", "| c d | - | - | 20 |"]
    assert [cell[-1] for cell in rule.strip("|").split("|")] == ["-", ":", ":", ":"]
