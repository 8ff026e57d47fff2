"""Compare trained and tested runs: tables, paired tests, figures and one HTML page.

    python compare.py runs/*
With your own names; runs that share a name are seeds of one method:
    python compare.py "Sim-MPNet=runs/acdc_1" "Sim-MPNet=runs/acdc_2" U-Net=runs/acdc_unet --split test

A run takes part with every split on which it was tested (results_<split> in its folder). Runs that differ only in their
seed are one method. docs/comparison.md explains the tables and tests.
"""

import logging
from argparse import Namespace
from pathlib import Path

import pandas as pd

from datasets.files import check_writable, file_stem
from utils import comparison_report as report
from utils.cli import ArgumentParser, run_script
from utils.comparison import compare, name_methods, paired_tests
from utils.errors import RunError
from utils.results import markdown, write_csv
from utils.tested_runs import Run, read_run

logger = logging.getLogger("compare")


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, each FOLDER or NAME=FOLDER")
    parser.add_argument("--split", nargs="+", default=(), help="splits to compare on; default: all that were tested")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"), help="folder of the results")
    parser.add_argument("--no_published", action="store_true", help="leave out the rows of published results")
    text = "folder that now holds the test cases of all runs, if it is not the one that they recorded"
    parser.add_argument("--volume_path", type=Path, help=text)
    return parser.parse_args()


def read_runs(args: Namespace) -> list[Run]:
    """Read the runs of the command line. Warn of each that is no run folder, is damaged or was not tested."""
    runs, errors = [], []
    for text in args.runs:
        name, folder = text.split("=", 1) if "=" in text and not Path(text).exists() else ("", text)
        if Path(folder).resolve() == args.output_dir.resolve():  # runs/* matches this folder too
            continue
        try:
            runs.append(read_run(folder, name.strip(), args.split, args.volume_path))
        except RunError as error:
            errors.append(error)
    if not runs:
        raise errors[-1] if errors else RunError(f"{args.runs[0]} holds no run: give folders that train_<set>.py wrote")
    for error in errors:
        logger.warning("left out: %s", error)
    return runs


def main() -> None:
    args = parse_args()
    runs = read_runs(args)
    names = dict.fromkeys(run.data for run in runs)
    by_data = {data: name_methods([run for run in runs if run.data == data]) for data in names}
    if len(names) > len({run.info.name for run in runs}):
        logger.info("separate tables for %s; if these are the same data, give --volume_path FOLDER", ", ".join(names))
    comparisons = [comparison for of_data in by_data.values() for comparison in compare(of_data)]
    check_writable(args.output_dir)

    colours = report.palette(run.method for of_data in by_data.values() for run in of_data)
    sections, scores, tests, figures = [], [], [], args.output_dir / "figures"
    for i, comparison in enumerate(comparisons, 1):
        rows = comparison.scores()
        tests.append(paired_tests(comparison))
        for caption, table in report.score_tables(comparison, rows, tests[-1]).items():
            print(f"{caption}\n\n{markdown(table)}\n")
        scores.append(rows if args.no_published else pd.concat([rows, report.published_rows(comparison)]))
        section = {"heading": f"{comparison.data}, {comparison.split}", "notes": report.notes(comparison, scores[-1])}
        section["tables"] = report.score_tables(comparison, scores[-1], tests[-1])
        name = f"{i}_{comparison.info.name}_{file_stem(comparison.split)}_boxes.png"
        sections.append(section | {"figures": report.draw_boxes(figures / name, comparison, colours)})
    for data, of_data in by_data.items():
        curves = report.draw_curves(figures / f"{file_stem(data)}_training.png", of_data, colours)
        section = {"heading": f"{data}, runs and training", "tables": report.run_tables(of_data)}
        sections.append(section | {"figures": curves})
    write_csv(args.output_dir / "comparison.csv", pd.concat(scores)[report.CSV_COLUMNS], "%.12g")
    write_csv(args.output_dir / "paired_tests.csv", pd.concat(tests), "%.12g")
    report.write_pages(args.output_dir, sections)
    logger.info("wrote %s; tables and figures are in the same folder", args.output_dir / "comparison.html")


if __name__ == "__main__":
    run_script(main)
