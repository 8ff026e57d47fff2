"""Compare trained and tested runs: tables, tests, figures and one HTML page of it all.

    python compare.py runs/*
Names of one's own; runs of one name are its seeds:
    python compare.py "Sim-MPNet=runs/acdc_1" "Sim-MPNet=runs/acdc_2" U-Net=runs/acdc_unet
Speed and memory on this machine too, and other cases in the figure of predictions:
    python compare.py runs/acdc_* --split test --measure --cases patient008_frame01 patient010_frame13

A run counts with every split that it was tested on (`results_<split>` in its folder). Runs that differ in their seed
alone are one method. `docs/comparison.md` says what the tables and tests mean.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import machine, peak_memory, time_sides
from datasets import DATASETS, DataError, VolumeDataset
from datasets.files import atomic_write, check_writable, file_stem
from datasets.image_sets import images_of
from networks import NetworkError
from networks.complexity import count_multiply_adds, count_parameters
from utils.arguments import flags_of_others, training_parser
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import ArgumentParser, pick_device, run_script
from utils.comparison import (
    Comparison,
    Method,
    Run,
    compare,
    group_runs,
    leave_out,
    paired_tests,
    read_run,
    striking_cases,
)
from utils.comparison_figures import example, save_box_plots, save_curves, save_qualitative
from utils.comparison_report import (
    Cost,
    notes,
    read_published,
    runs_table,
    settings_table,
    tables,
    write_csv,
    write_tests_csv,
)
from utils.errors import RunError
from utils.evaluation import Volume, predict_volume
from utils.html_page import Picture, Section, page
from utils.tables import Table, escape_markdown, latex, markdown

logger = logging.getLogger("compare")

PUBLISHED = Path(__file__).parent / "docs" / "published_results.csv"
Key = tuple[str, str]
"""Data set and method."""


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, each FOLDER or NAME=FOLDER")
    parser.add_argument("--split", nargs="+", help="only these; default: every split that a run was tested on")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/comparison"), help="folder of the results")
    parser.add_argument("--no_published", action="store_true", help="leave the published rows out")
    parser.add_argument("--measure", action="store_true", help="measure images per second and memory of each method")
    parser.add_argument("--num_cases", type=int, default=3, help="in the figure of predictions; 0: no such figure")
    parser.add_argument("--cases", nargs="+", help="in that figure; default: those on which the methods differ most")
    parser.add_argument(
        "--volume_path", type=Path, help="folder of the volumes, or of images and masks; default: as in training"
    )
    parser.add_argument("--list_dir", type=Path, help="folder of the lists; default: as in training")
    parser.add_argument("--batch_size", type=int, default=8, help="slices measured and predicted at a time")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.batch_size < 1 or args.num_cases < 0:
        raise RunError(f"--batch_size {args.batch_size} --num_cases {args.num_cases}; expected at least 1 and 0")
    return args


def find_runs(given: Sequence[str], output_dir: Path) -> list[tuple[str | None, Run]]:
    """Read the run folders with the names given to them; what is no run folder is left out, with a warning."""
    runs: list[tuple[str | None, Run]] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = None, text
        elif not (name.strip() and folder):
            raise RunError(f"{text}: expected FOLDER or NAME=FOLDER, with a name and a folder")
        if Path(folder).resolve() == output_dir.resolve():
            continue
        try:
            run = read_run(folder)
        except RunError as error:
            logger.warning("left out: %s", error)
            continue
        if run.dataset not in DATASETS:
            raise RunError(f"{folder}/config.json names the data set {run.dataset}: expected {', '.join(DATASETS)}")
        runs.append((name and name.strip(), run))
    if not runs:
        raise RunError(f"no run folder in {' '.join(given)}: give folders that train_<set>.py wrote")
    return runs


def tested(runs: list[tuple[str | None, Run]], splits: Sequence[str] | None) -> list[tuple[str | None, Run]]:
    """Leave out, with a warning, the runs without results to compare, so that they set no others apart."""
    kept = [(name, run) for name, run in runs if any(split in run.results for split in splits or run.results)]
    if not kept:
        return runs  # comparing them says so
    for _, run in runs:
        if run.folder not in {other.folder for _, other in kept}:
            leave_out(run, DATASETS[run.dataset], splits[0] if splits else None)
    return kept


def training_defaults() -> dict[str, dict]:
    """Return the arguments of training that a run has where its user said nothing, by data set."""
    return {name: vars(training_parser("", info).parse_args([])) for name, info in DATASETS.items()}


def load(method: Method) -> torch.nn.Module:
    """Rebuild the network of a method's first seed."""
    path = method.runs[0].checkpoint
    channels = 3 if DATASETS[method.dataset].planar else 1
    return build_network(load_checkpoint(path), path, channels).eval()


def measured(models: Mapping[Key, torch.nn.Module], costs: Mapping[Key, Cost], args: Namespace) -> dict[Key, Cost]:
    """Add to the costs what is measured on this machine; all networks are timed in turn."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which sees the memory, says that there is no GPU
    device = pick_device(args.device)
    passes = {key: forward_pass(model, args.batch_size) for key, model in models.items()}
    seconds = time_sides(passes, device=device)
    return {
        key: replace(
            cost,
            images_per_second=args.batch_size / seconds[key],
            peak_memory=peak_memory(passes[key], device),
            device=machine(device),
            batch_size=args.batch_size,
        )
        for key, cost in costs.items()
    }


def forward_pass(model: torch.nn.Module, batch_size: int) -> Callable[[], list[torch.Tensor]]:
    """Return what predicts a batch of random images once."""
    size, channels = model.config["img_size"], model.config["in_channels"]
    images = torch.rand(batch_size, channels, size, size, device=next(model.parameters()).device)
    return torch.inference_mode()(lambda: model(images))


def open_volumes(comparison: Comparison, args: Namespace) -> Sequence[Volume]:
    """Open the volumes or images of a comparison, where its first run had them unless the user says otherwise."""
    info, trained = DATASETS[comparison.dataset], next(iter(comparison.methods.values())).runs[0].args
    folder = args.volume_path or trained.get("volume_path", info.volume_path)
    list_dir, num_classes = args.list_dir or trained.get("list_dir", info.list_dir), len(comparison.class_names) + 1
    if info.planar:
        return images_of(info, folder, list_dir, comparison.split, num_classes)
    info.require(folder)
    order = info.label_order(trained.get("label_order"), num_classes)
    return VolumeDataset(folder, list_dir, comparison.split, num_classes, order)


def choose_cases(comparisons: Sequence[Comparison], args: Namespace) -> list[list[str]]:
    """Return the cases of each comparison's figure; raises RunError for one that no run was tested on."""
    if not args.cases or not args.num_cases:
        return [striking_cases(comparison, args.num_cases) for comparison in comparisons]
    tested = [{case for scores in c.scores.values() for case in scores.cases} for c in comparisons]
    for case in args.cases:
        if not any(case in cases for cases in tested):
            some = ", ".join(sorted(tested[0])[:5])
            raise RunError(f"--cases {case}: no run was tested on it; they were on {some}, ... (cases.csv has all)")
    return [[case for case in args.cases if case in cases] for cases in tested]


def examine(comparisons: Sequence[Comparison], args: Namespace) -> tuple[dict[Key, torch.nn.Module], dict[Key, Cost]]:
    """Return the network and the cost of every method whose checkpoint is there, by data set and method."""
    device = pick_device(args.device)
    methods = {(c.dataset, name): method for c in comparisons for name, method in c.methods.items()}
    models: dict[Key, torch.nn.Module] = {}
    costs: dict[Key, Cost] = {}
    for key, method in methods.items():
        try:
            model = load(method)
        except RunError as error:
            logger.warning("%s: its size is not known, nor what it predicts: %s", method.name, error)
            continue
        # counted on the CPU, as DMW-LA spends multiply-adds on a GPU to spare it questions
        work = count_multiply_adds(model, model.config["img_size"], model.config["in_channels"])
        costs[key], models[key] = Cost(count_parameters(model), work), model.to(device)
    return models, measured(models, costs, args) if args.measure else costs


def draw_boxes(path: Path, comparison: Comparison) -> Picture:
    """Draw the box plots of a comparison."""
    values = {name: scores.per_case("strict")[:, :-1] for name, scores in comparison.scores.items()}
    save_box_plots(path, comparison.class_names, values, comparison.distance_unit("strict"))
    return Picture(
        path,
        f"Box plots of Dice and HD95 of each class, {comparison.title}",
        "Strict convention, seeds averaged first. Box: quartiles and median; whiskers: the last case within 1.5 box "
        "heights; dots: cases.",
    )


def draw_predictions(
    path: Path, comparison: Comparison, cases: Sequence[str], models: Mapping[str, torch.nn.Module], args: Namespace
) -> Picture | None:
    """Draw what every method predicts on the cases, or say why not and return None where the data are not at hand."""
    try:
        volumes = open_volumes(comparison, args)
        missing = [case for case in cases if case not in volumes.names]
        if missing:
            raise DataError(f"{volumes.source} has no {missing[0]}; give the list that was tested with --list_dir")
        examples = []
        for case in cases:
            volume = volumes[volumes.names.index(case)]
            predictions = {
                name: predict_volume(
                    model, volume, model.config["img_size"], args.batch_size, next(model.parameters()).device
                )
                for name, model in models.items()
            }
            examples.append(example(volume, predictions))
    except DataError as error:
        logger.warning("no figure of predictions of %s: %s", comparison.title, error)
        return None
    save_qualitative(path, examples, comparison.class_names)
    return Picture(
        path,
        f"Image, label and the prediction of every method on {', '.join(cases)}",
        "Predictions of each method's first seed. Of a volume the slice on which the methods' errors differ most is "
        "shown, cut out around label and predictions; its Dice is the mean over the classes there.",
    )


def published_beside(comparison: Comparison, comparisons: Sequence[Comparison]) -> Comparison:
    """Return which comparison of the data set has the published rows: on its test split, or as near to that as is."""
    of_set = [other for other in comparisons if other.dataset == comparison.dataset]
    by_split = {other.split: other for other in reversed(of_set)}
    return next((by_split[s] for s in reversed(DATASETS[comparison.dataset].splits) if s in by_split), of_set[0])


def on_own_lists(comparison: Comparison) -> bool:
    """Whether all runs have the data set's own lists, so that the published rows are of like cases."""
    own = Path(DATASETS[comparison.dataset].list_dir).resolve()
    runs = (run for method in comparison.methods.values() for run in method.runs)
    return all(Path(run.args.get("list_dir", own)).resolve() == own for run in runs)


def training_section(dataset: str, methods: Sequence[Method], folder: Path) -> Section:
    """List the runs of a data set and draw how they trained."""
    listed = (table for table in (runs_table(methods), settings_table(methods)) if table.rows)
    section = Section(f"{dataset}, runs and training", [*listed])
    histories = {method.name: [run.history for run in method.runs if run.history] for method in methods}
    if any(histories.values()):
        path = folder / f"{file_stem(dataset)}_training.png"
        save_curves(path, histories)
        caption = "A line per run. Losses compare only between methods that are trained with the same one."
        section.content.append(Picture(path, f"Training loss and validation Dice over the epochs, {dataset}", caption))
    return section


def write_pages(folder: Path, sections: Sequence[Section]) -> None:
    """Write the sections as Markdown and HTML, and their tables as LaTeX."""
    text, tex = ["# Comparison of runs\n"], ["% needs the packages booktabs and graphicx\n"]
    for section in sections:
        text.append(f"## {escape_markdown(section.heading)}\n")
        for content in section.content:
            if isinstance(content, Table):
                text.append(markdown(content))
                tex.append(latex(content))
            elif isinstance(content, Picture):
                where = content.path.relative_to(folder).as_posix()
                text.append(
                    f"![{escape_markdown(content.description)}]({where})\n\n{escape_markdown(content.caption)}\n"
                )
            else:
                text.append(f"{escape_markdown(content)}\n")
    files = {"md": "\n".join(text), "tex": "\n".join(tex), "html": page("Comparison of runs", sections)}
    for ending, content in files.items():
        with atomic_write(folder / f"comparison.{ending}") as temporary:
            temporary.write_text(content, encoding="utf-8")


def main() -> None:
    args = parse_args()
    runs = tested(find_runs(args.runs, args.output_dir), args.split)
    methods = group_runs(runs, training_defaults(), flags_of_others())
    comparisons = compare(methods, DATASETS, args.split)
    if (args.volume_path or args.list_dir) and len({c.dataset for c in comparisons}) > 1:
        raise RunError("--volume_path and --list_dir are of one data set, the runs of several: compare one at a time")
    chosen = choose_cases(comparisons, args)
    published = {} if args.no_published else read_published(PUBLISHED)
    for dataset in {comparison.dataset for comparison in comparisons if not on_own_lists(comparison)}:
        published.pop(dataset, None)
    check_writable(args.output_dir)
    models, costs = examine(comparisons, args)

    sections, tests, folder = [], [], args.output_dir / "figures"
    for number, (comparison, cases) in enumerate(zip(comparisons, chosen, strict=True), 1):
        own_models, own_costs = (
            {name: of[comparison.dataset, name] for name in comparison.methods if (comparison.dataset, name) in of}
            for of in (models, costs)
        )
        own_tests = paired_tests(comparison)
        tests += [(comparison, test) for test in own_tests]
        beside = (
            published.get(comparison.dataset, ()) if comparison is published_beside(comparison, comparisons) else ()
        )
        made = tables(comparison, own_costs, beside, own_tests)
        print("\n".join(markdown(replace(table, published=())) for table in made).replace("\\<", "<"))
        stem = f"{number}_{file_stem(comparison.dataset)}_{file_stem(comparison.split)}"
        pictures = [draw_boxes(folder / f"{stem}_boxes.png", comparison)]
        if cases and own_models:
            pictures.append(draw_predictions(folder / f"{stem}_predictions.png", comparison, cases, own_models, args))
        sections.append(Section(comparison.title, [*notes(comparison), *made, *filter(None, pictures)]))
    for dataset in dict.fromkeys(comparison.dataset for comparison in comparisons):
        sections.append(training_section(dataset, [m for m in methods if m.dataset == dataset], folder))
    write_pages(args.output_dir, sections)
    write_csv(args.output_dir / "comparison.csv", comparisons, costs, published)
    write_tests_csv(args.output_dir / "paired_tests.csv", tests)
    logger.info("the page is %s, tables and figures are beside it", args.output_dir / "comparison.html")


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
