"""Train or test with the arguments of a script: open and check the data, build the network, write the results."""

import json
import logging
import math
import multiprocessing
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm

from datasets import DatasetInfo, Volume
from datasets.errors import brief, counted
from datasets.files import file_stem, write_text
from datasets.image_files import save_png
from datasets.lists import list_path
from networks import build, default_weights
from networks.ranks import rank
from utils.arguments import check_n_gpu, network_arguments, parse_training
from utils.checkpoint import cases_described, cases_seen, load_fitting, refuse_other_data
from utils.cli import ArgumentParser, seed_everything, set_precision, setup_logging
from utils.data_checks import Cases, compare_with_checkpoint, open_cases, open_samples, quick_check
from utils.distribution import launched, process_group, rank_device
from utils.errors import RunError
from utils.evaluation import evaluate, save_nifti
from utils.figures import save_overlays
from utils.metrics import ABSENT, SPURIOUS
from utils.onnx_network import is_onnx
from utils.predictor import Predictor
from utils.results import case_table, format_summary, summarise, write_csv
from utils.training import Trainer

logger = logging.getLogger(__name__)


def train(parser: ArgumentParser, info: DatasetInfo, argv: list[str] | None = None) -> None:
    """Train a network on a data set, with the arguments of ``parse_training``."""
    args, checkpoint = parse_training(parser, info, argv)
    device = rank_device(args.device)
    if args.sync_bn and device.type == "cpu":
        raise RunError("--sync_bn needs GPUs, and this run is on the CPU: leave --sync_bn out")
    with process_group(device):
        make_trainer(args, checkpoint, info, device).fit()


def make_trainer(
    args: Namespace, checkpoint: dict[str, Any] | None, info: DatasetInfo, device: torch.device
) -> Trainer:
    """Open and check the data, build the network, and load the checkpoint to continue or start from.

    args, checkpoint: what ``parse_training`` returned; info: the data set. Once all is loaded, train.log is opened.
    """
    options = {"img_size": args.img_size, "augment": True, "seed": args.seed}
    options |= {"photometric": args.photometric} if info.planar else {}
    held_out = vars(args).get("val_cases") if args.val_split == args.train_split else None
    train_set = open_samples(info, args, args.train_split, held_out or (), **options)
    # Held-out cases are in the training list; in public files these exist only as slices, in root_path.
    val_set = open_cases(info, args, args.val_split, held_out, args.root_path if held_out else None)
    info = quick_check(train_set, val_set, info, args)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    set_precision(args.amp, device)
    model = new_network(args, pretrained=checkpoint is None)
    resumed = args.resume is not None
    lines = load_fitting(model, checkpoint, args.init_from) if checkpoint and not resumed else []
    if args.num_workers and multiprocessing.get_start_method() != "fork":
        logger.info("data are not kept in memory: here each worker would need a copy (--num_workers 0 keeps them)")
    else:  # reads the files, so that a damaged one is found before anything is written
        kept = train_set.keep(int(args.cache_gib * 2**30))
        if kept < len(train_set):
            logger.info("%d of %d training samples fit into --cache_gib %g", kept, len(train_set), args.cache_gib)
    if rank():
        torch.manual_seed(args.seed + rank())  # the ranks have equal networks, but different drop path
    trainer = Trainer(model, info, train_set, val_set, args, device)
    if resumed:  # an old checkpoint does not describe its data
        refuse_other_data(args.resume, checkpoint.get("described", trainer.described), trainer.described)
        try:
            trainer.load_state_dict(checkpoint)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            remedy = "give a last.pth of this version"
            raise RunError(f"cannot resume from {args.resume} ({brief(error)}): {remedy}") from error
        lines = [f"continue after epoch {trainer.epoch}, iteration {trainer.iteration} from {args.resume}"]
    elif checkpoint:
        _inherit_choices(trainer, checkpoint, info)
    setup_logging(Path(args.output_dir) / "train.log")
    if known := {*trainer.seen.get(info.name, ())}.intersection(val_set.names):
        text = "the weights that this run starts from were trained on %d of %d validation cases: scores are optimistic"
        logger.warning(text, len(known), len(val_set))
    if args.selected_on == "test":
        logger.warning("the best epoch is chosen on the test cases, as the release does: its scores are optimistic")
    elif trainer.data["selected_on"] == "test":
        logger.warning("the weights that this run starts from were chosen on the test cases: scores are optimistic")
    for line in lines:
        logger.info("%s", line)
    return trainer


def _inherit_choices(trainer: Trainer, checkpoint: dict[str, Any], info: DatasetInfo) -> None:
    """Record which cases the initial weights have seen, and whether they were chosen on test cases of this data set."""
    # The authors chose the checkpoints of the release on the test volumes of the public sets.
    public = {"dataset": info.name, "selected_on": "test"} if info.fold is None else {}
    before = checkpoint.get("data", public)
    trainer.seen = cases_seen(checkpoint, before.get("dataset", ""))
    if before.get("dataset") == info.name and before.get("selected_on") == "test":
        trainer.data["selected_on"] = "test"


def new_network(args: Namespace, pretrained: bool) -> torch.nn.Module:
    """Build the network on the CPU; if ``pretrained``, load ImageNet weights unless --pretrained is none."""
    options = network_arguments(args)
    weights = None
    if pretrained and args.pretrained != "none":
        weights = args.pretrained or default_weights(args.network, options)
    model = build(args.network, weights, **options)
    if any(True for _ in model.memory_banks()) and find_spec("faiss") is None:
        raise RunError("faiss is not installed, but the memory's warm-up needs it: pip install -r requirements.txt")
    return convert_sync_batchnorm(model) if args.sync_bn else model


def test(parser: ArgumentParser, info: DatasetInfo, argv: list[str] | None = None) -> None:
    """Test a checkpoint on a data set with the arguments of ``testing_parser``; write tables and requested files."""
    args = parser.parse_args(argv)
    check_n_gpu(args)
    if launched():
        raise RunError("testing uses one process: run it without torchrun")
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    if (args.checkpoint / "best.pth").is_file():
        args.checkpoint = args.checkpoint / "best.pth"
    if not args.checkpoint.exists():
        last = args.checkpoint.with_name("last.pth")
        remedy = f"train one with python {info.train_script}, or give another with --checkpoint"
        if args.checkpoint.name == "best.pth" and last.is_file():
            remedy = f"this training has not chosen a best epoch yet: test {last}"
        raise RunError(f"no checkpoint at {args.checkpoint}: {remedy}")
    if is_onnx(args.checkpoint):
        raise RunError(f"{args.checkpoint} is an ONNX file, which only predict.py reads: give a best.pth")
    predictor = Predictor(args.checkpoint, args.device, args.amp, args.batch_size, info, args.prediction)
    args.num_classes = predictor.model.config["num_classes"]
    where = "root_path" if info.planar else "volume_path"
    _choose_folders(args, info, where, predictor.origin.get("args", {}))
    tested = getattr(args, where)
    if not tested.is_dir():
        remedy = f"give the folder with --{where} and the folder of its lists with --list_dir, or {info.how_to_get}"
        raise RunError(f"{tested}: no such folder; {remedy}")
    cases = open_cases(info, args, args.split, vars(args).get("cases"))
    whole = "results" if vars(args).get("cases") is None else "cases"  # compare.py reads only tests of whole lists
    folder = args.test_save_dir or args.checkpoint.parent / f"{whole}_{args.split}"
    if folder.resolve() == tested.resolve():
        raise RunError(f"--test_save_dir {folder} is the folder of the data: give another folder")
    again = (folder / "test.log").is_file()
    setup_logging(folder / "test.log")
    class_names = compare_with_checkpoint(cases, info, predictor.data)
    if again:
        _remove_figures(folder)
    _warn_of_misleading_scores(args, predictor, cases)
    split = list_path(args.list_dir, args.split)
    count = counted(len(cases), "case")
    logger.info("%s on %s of the list %s, data in %s, on %s", args.checkpoint, count, split, tested, predictor.device)

    def save(case: Volume, prediction: np.ndarray) -> None:
        case.class_names = class_names
        if args.save_predictions and case.planar:
            save_png(folder / "masks" / f"{file_stem(case.name)}.png", prediction[0])
        elif args.save_predictions:
            save_nifti(folder / "nifti", prediction, case)
        if args.overlays:
            save_overlays(folder / "overlays", case, prediction, count=args.overlays)

    results = evaluate(predictor.segment, cases, args.num_classes, save)
    for c, name in enumerate(class_names):
        if all(result.classes[c].state in (ABSENT, SPURIOUS) for result in results):
            logger.warning("no label of these cases contains the class %s", name)
    table = case_table(results, class_names, predictor.data.get("selected_on", "val"))
    summary = summarise(table, sum(result.confusion for result in results) if info.planar else None)
    summary["data"] = {where: str(tested), "list_dir": str(args.list_dir), "split": args.split}
    file, epoch = args.checkpoint.name, predictor.origin.get("epoch")
    trained = predictor.origin.get("args", {})
    trained = {name: str(value) if value == math.inf else value for name, value in trained.items()}  # JSON has no inf
    summary["checkpoint"] = {"file": file, "epoch": epoch, "prediction": args.prediction, "args": trained}
    summary["labels"] = {result.name: result.label for result in results}
    (folder / "cases.csv").unlink(missing_ok=True)  # compare.py must not find files of two tests
    write_text(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_csv(folder / "cases.csv", table)
    print(format_summary(summary))
    logger.info("results in %s", folder)


def _warn_of_misleading_scores(args: Namespace, predictor: Predictor, cases: Cases) -> None:
    """Warn if the training has used cases of this test, or if the images are of another kind than in training."""
    data = predictor.data
    if args.checkpoint.name == "best.pth" and data.get("selected_on") != "test":  # for "test", the tables say it
        chosen_on = cases_described(predictor.origin, "validation")
        if not chosen_on and args.split == predictor.origin.get("args", {}).get("val_split"):
            chosen_on = {*cases.names}  # an old checkpoint does not describe its data
        if known := chosen_on.intersection(cases.names):
            text = "the best epoch was chosen on %d of these %d cases, so their scores are optimistic: test last.pth"
            logger.warning(text, len(known), len(cases))
    seen = cases_seen(predictor.origin, data.get("dataset", ""))
    if trained := {*seen.get(data.get("dataset"), ())}.intersection(cases.names):
        logger.warning(
            "the checkpoint was trained on cases of this list (%d of %d, such as %s): their scores are optimistic",
            len(trained), len(cases), min(trained),
        )  # fmt: skip
    if data.get("kind", "") not in ("", getattr(cases, "kind", "")):
        logger.warning(
            "%s was trained on %s, but these are %s: check --root_path", args.checkpoint, data["kind"], cases.kind
        )


def _choose_folders(args: Namespace, info: DatasetInfo, where: str, saved: dict[str, Any]) -> None:
    """Fill in the folders of the test, ``where`` and ``list_dir``, if the command line does not give them.

    The folders of the training, whose arguments are ``saved``, are used if they exist on this machine, otherwise those
    of the data set. If the test uses the folder of the training, it also uses the label order of the training.
    """
    fold = vars(args).get("fold")
    if saved.get("fold", fold) != fold and args.split != "test" and args.list_dir is None:  # it trained on these cases
        raise RunError(
            f"{args.checkpoint} was trained on fold {saved['fold']}: test it with --fold {saved['fold']}, or give the "
            "folder of other lists with --list_dir"
        )
    of_these_data = all(str(saved.get(name)) == str(vars(args).get(name)) for name in ("data", "fold"))
    for name in (where, "list_dir"):
        if getattr(args, name) is not None:
            continue
        default = Path(getattr(info, name))
        folder = Path(saved[name]) if of_these_data and saved.get(name) else default
        if folder != default and not folder.is_dir():
            logger.info("the training's --%s %s does not exist here, so %s is used", name, folder, default)
            folder = default
        setattr(args, name, folder)
    order = saved.get("label_order")
    if order is not None and info.label_orders and args.label_order is None:
        same = saved.get(where) and Path(saved[where]).resolve() == Path(getattr(args, where)).resolve()
        if not same and order != next(iter(info.label_orders)):
            raise RunError(f"the training had --label_order {order}: give the --label_order of these other files")
        args.label_order = order  # for other files this is the first order, the default


def _remove_figures(folder: Path) -> None:
    """Remove the predictions and figures that an earlier test wrote to its folder of results."""
    patterns = ("overlays/*.png", "masks/*.png", *(f"nifti/*_{kind}.nii.gz" for kind in ("pred", "img", "gt")))
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
