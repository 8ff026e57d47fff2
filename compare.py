"""Compare trained and tested runs: tables, paired tests, figures and one HTML page.

    python compare.py runs/*
With names of your own; runs of one name are its seeds:
    python compare.py "Sim-MPNet=runs/acdc_1" "Sim-MPNet=runs/acdc_2" U-Net=runs/acdc_unet
With other cases in the figure of predictions:
    python compare.py runs/acdc_* --split test --cases patient008_frame01 patient010_frame13

A run takes part with every split on which it was tested (results_<split> in its folder). Runs that differ only in their
seed are one method. docs/comparison.md explains the tables and tests.
"""

import logging
from argparse import Namespace
from functools import cache
from pathlib import Path

import pandas as pd

from datasets import DataError
from datasets.files import check_writable, file_stem
from networks import NetworkError
from networks.complexity import count_multiply_adds, count_parameters
from utils import comparison_report as report
from utils.cli import ArgumentParser, pick_device, run_script
from utils.comparison import Comparison, compare, drop_untested, group_runs, paired_tests, read_runs, striking_cases
from utils.comparison_figures import draw_box_plots, draw_curves, draw_predictions, open_volumes
from utils.errors import RunError
from utils.predictor import Predictor
from utils.results import markdown

logger = logging.getLogger("compare")


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, each FOLDER or NAME=FOLDER")
    parser.add_argument("--split", nargs="+", help="splits to compare on; default: all on which a run was tested")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"), help="folder of the results")
    parser.add_argument("--no_published", action="store_true", help="leave out the published rows")
    parser.add_argument("--num_cases", type=int, default=3, help="cases in the figure of predictions; 0: no figure")
    parser.add_argument("--cases", nargs="+", help="cases in that figure; default: where the methods differ most")
    parser.add_argument("--volume_path", type=Path, help="folder of the volumes or images; default: as in training")
    parser.add_argument("--list_dir", type=Path, help="folder of the lists; default: as in training")
    parser.add_argument("--batch_size", type=int, default=8, help="slices predicted at a time")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_cases < 0:
        parser.error(f"--batch_size {args.batch_size} --num_cases {args.num_cases}: expected at least 1 and 0")
    pick_device(args.device)
    return args


@cache
def load_network(checkpoint: Path, dataset: str, device: str, batch_size: int) -> tuple[Predictor, report.Cost]:
    """Return the network of a checkpoint on a device, and what it costs."""
    predictor = Predictor(checkpoint, "cpu", batch_size=batch_size, dataset=dataset)
    model = predictor.model
    # Count on the CPU: on a GPU, DMW-LA takes more multiply-adds to avoid synchronisation.
    work = count_multiply_adds(model, model.config["img_size"], model.config["in_channels"])
    predictor.device = pick_device(device)
    predictor.model = model.to(predictor.device)
    return predictor, (count_parameters(model), int(work))


def load_networks(comparison: Comparison, args: Namespace) -> dict[str, tuple[Predictor, report.Cost]]:
    """Return network and cost of each method's first seed; a checkpoint that is missing is left out with a warning."""
    networks = {}
    for name, method in comparison.methods.items():
        try:
            checkpoint = method.runs[0].checkpoint
            networks[name] = load_network(checkpoint, comparison.dataset, args.device, args.batch_size)
        except (RunError, NetworkError) as error:
            logger.warning("%s: its size and its predictions are left out: %s", name, error)
    return networks


def main() -> None:
    args = parse_args()
    methods = group_runs(drop_untested(read_runs(args.runs, args.output_dir), args.split))
    comparisons = compare(methods, args.split)
    if (args.volume_path or args.list_dir) and len({comparison.dataset for comparison in comparisons}) > 1:
        raise RunError("--volume_path and --list_dir fit one data set, the runs have several: compare one at a time")
    tested = dict.fromkeys(case for comparison in comparisons for case in comparison.cases["case"])
    for case in [case for case in args.cases or () if case not in tested]:
        raise RunError(f"--cases {case}: no run was tested on it; expected some of {', '.join(list(tested)[:5])}, ...")
    check_writable(args.output_dir)

    sections, scores, tests, figures = [], [], [], args.output_dir / "figures"
    beside = [] if args.no_published else report.beside_published(comparisons)
    for number, comparison in enumerate(comparisons, 1):
        networks = load_networks(comparison, args)
        rows = report.score_rows(comparison, {name: cost for name, (_, cost) in networks.items()})
        tests.append(paired_tests(comparison))
        for table in report.score_tables(comparison, rows, tests[-1]):
            print(f"{table.caption}\n\n{markdown(table.frame)}\n")
        if comparison in beside:
            rows = pd.concat([rows, report.published_rows(comparison.dataset, comparison.class_names)])
        scores.append(rows)

        cases = striking_cases(comparison, args.num_cases)
        if args.cases and args.num_cases:
            cases = [case for case in args.cases if case in set(comparison.cases["case"])]
        tables = report.score_tables(comparison, rows, tests[-1])
        stem = f"{number}_{file_stem(comparison.dataset)}_{file_stem(comparison.split)}"
        pictures = [draw_box_plots(figures / f"{stem}_boxes.png", comparison)]
        if cases and networks:
            path, predictors = figures / f"{stem}_predictions.png", {name: p for name, (p, _) in networks.items()}
            try:
                volumes = open_volumes(comparison, args.volume_path, args.list_dir)
                pictures.append(draw_predictions(path, comparison, volumes, cases, predictors))
            except DataError as error:
                logger.warning("no figure of predictions of %s: %s", comparison.title, error)
        sections.append(report.Section(comparison.title, report.notes(rows, tests[-1]), tables, pictures))
    for dataset in dict.fromkeys(method.dataset for method in methods):
        of_set = [method for method in methods if method.dataset == dataset]
        tables = [table for table in (report.runs_table(of_set), report.settings_table(of_set)) if len(table.frame)]
        curves = draw_curves(figures / f"{file_stem(dataset)}_training.png", of_set)
        sections.append(report.Section(f"{dataset}, runs and training", [], tables, curves))
    report.write_csv(args.output_dir, scores, tests)
    report.write_pages(args.output_dir, sections)
    logger.info("wrote %s, tables and figures are beside it", args.output_dir / "comparison.html")


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
