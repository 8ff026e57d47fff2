"""What a training and a test script do once their arguments and data are known."""

import logging
import multiprocessing
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm

from datasets.files import file_stem
from networks.ranks import rank
from utils.arguments import Dataset, Networks, check_n_gpu, network_arguments
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import AMP_DTYPES, pick_device, seed_everything, set_precision, setup_logging
from utils.distribution import launched, process_group, rank_device
from utils.errors import RunError
from utils.evaluation import Volume, evaluate, save_mask, save_nifti
from utils.figures import save_overlays
from utils.results import case_table, format_summary, summarise, write_cases, write_summary
from utils.training import DataFacts, Trainer, TrainingSet
from utils.watch import out_of_memory

logger = logging.getLogger(__name__)


def train(
    args: Namespace,
    checkpoint: dict | None,
    dataset: Dataset,
    train_set: TrainingSet,
    val_set: Sequence[Volume],
    networks: Networks,
    default_weights: Callable[[str, dict], str | Path | None],
) -> None:
    """Build the network, or take up the checkpoint's, and train it into the run folder.

    Args:
        args, checkpoint: what ``parse_training`` returned.
        dataset: what is trained on.
        train_set: slices or images to train on.
        val_set: volumes or images to choose the best epoch on.
        networks: what ``--network`` chooses from.
        default_weights: gives of a network and its arguments what it starts from where ``--pretrained`` says nothing.
    """
    device = rank_device(args.device)
    if args.sync_bn and device.type == "cpu":
        raise RunError("--sync_bn on the CPU: PyTorch synchronises BatchNorm only between GPUs, leave it out")
    with process_group(device):
        seed_everything(args.seed, deterministic=bool(args.deterministic))
        set_precision(args.amp)
        options = network_arguments(args, networks)
        pretrained = None if checkpoint else _pretrained(args, options, default_weights)
        keep_in_memory(train_set, args)  # before anything is written: a damaged file is found here
        model = networks[args.network](**options, pretrained=pretrained)
        if any(True for _ in model.memory_banks()) and find_spec("faiss") is None:
            raise RunError("faiss is not installed, which ends the memory's warm-up: pip install -r requirements.txt")
        if args.sync_bn:
            model = convert_sync_batchnorm(model)
        if rank():
            torch.manual_seed(args.seed + rank())  # the same network, but chance of its own, for drop path
        setup_logging(Path(args.output_dir) / "train.log")
        names, preprocessing = dataset.names_for(args.num_classes), dataset.preprocessing.to_dict()
        facts = DataFacts(dataset.name, names, preprocessing, args.selected_on, getattr(train_set, "kind", ""))
        if facts.selected_on == "test":
            logger.warning(
                "the best epoch is chosen on the test volumes, as the release does: its scores are optimistic"
            )
        trainer = Trainer(model, train_set, val_set, facts, args, device)
        if checkpoint:
            _take_up(trainer, checkpoint, args.resume)
        trainer.fit()


def test(
    args: Namespace,
    dataset: Dataset,
    open_volumes: Callable[[int], Sequence[Volume]],
    network: Callable[..., torch.nn.Module],
    load_release: Callable[[torch.nn.Module, dict], None],
) -> None:
    """Rebuild a checkpoint's network, test it and write tables, and pictures and NIfTI on request.

    Args:
        args: the arguments of ``testing_parser``.
        dataset: what is tested on; it names the classes where the checkpoint, one of the release, does not.
        open_volumes: gives the volumes to test on, for a number of classes.
        network: builds what a checkpoint describes: ``networks.build``.
        load_release: ``load_release_state_dict``.
    """
    check_n_gpu(args)
    if launched():
        raise RunError("testing is one process's work: leave torchrun out")
    if args.batch_size < 1 or args.overlays < 0:
        raise RunError(f"--batch_size {args.batch_size} --overlays {args.overlays}; expected at least 1 and 0")
    device = pick_device(args.device)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    set_precision(args.amp)
    checkpoint = load_checkpoint(args.checkpoint)
    # A checkpoint of the release says nothing of its data; it was chosen on the test volumes.
    data = checkpoint.get("data", {"dataset": dataset.name, "class_names": dataset.class_names, "selected_on": "test"})
    if data["dataset"] != dataset.name:
        raise RunError(f"{args.checkpoint} was trained on {data['dataset']}: test it with test_{data['dataset']}.py")
    channels = 3 if dataset.planar else 1
    model = build_network(checkpoint, args.checkpoint, network, load_release, channels).to(device)
    num_classes = model.config["num_classes"]
    class_names, selected_on = data["class_names"], data.get("selected_on", "val")
    if len(class_names) != num_classes - 1:
        raise RunError(
            f"{args.checkpoint} has {num_classes} classes with background, these data {len(class_names) + 1}"
        )
    volumes = open_volumes(num_classes)
    # Photographs take too long to be read twice.
    doubts = [] if dataset.planar else _read_through(volumes, dataset, num_classes)
    trained_on, kind = data.get("kind", ""), getattr(volumes, "kind", "")
    if trained_on and trained_on != kind:
        doubts.append(f"{args.checkpoint} was trained on {trained_on}, these are {kind}; look at --root_path")
    folder = args.test_save_dir or args.checkpoint.parent / f"results_{args.split}"
    setup_logging(folder / "test.log")
    for doubt in doubts:
        logger.warning("%s", doubt)
    logger.info("%s on %d cases of the list %s, on %s", args.checkpoint, len(volumes), args.split, device)

    def save(volume: Volume, prediction: np.ndarray) -> None:
        volume.class_names = volume.class_names or tuple(class_names)
        if args.save_predictions and volume.planar:
            save_mask(folder / "masks" / f"{file_stem(volume.name)}.png", prediction[0])
        elif args.save_predictions:
            save_nifti(folder / "nifti", prediction, volume)
        if args.overlays:
            save_overlays(folder / "overlays", volume, prediction, count=args.overlays)

    with out_of_memory(f"--batch_size {args.batch_size} is too much for it; lower it, or use --amp bf16"):
        results = evaluate(
            model,
            volumes,
            num_classes,
            model.config["img_size"],
            args.batch_size,
            device,
            AMP_DTYPES[args.amp],
            on_case=save if args.save_predictions or args.overlays else None,
        )
    table = case_table(results, class_names, selected_on)
    summary = summarise(table, sum(result.confusion for result in results) if dataset.planar else None)
    write_cases(folder / "cases.csv", table)
    write_summary(folder / "summary.json", summary)
    print(format_summary(summary))
    logger.info("results in %s", folder)


def _take_up(trainer: Trainer, checkpoint: dict, path: Path) -> None:
    try:
        trainer.load_state_dict(checkpoint)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} cannot be gone on from ({type(error).__name__}: {error}): resume from a last.pth of this version"
        ) from error
    within = f" and iteration {trainer.steps} of epoch {trainer.epoch + 1}" if trainer.samples else ""
    logger.info("go on after epoch %d%s from %s", trainer.epoch, within, path)


def keep_in_memory(train_set: TrainingSet, args: Namespace) -> None:
    """Let the training set keep what it read, up to ``--cache_gib``."""
    if args.num_workers and multiprocessing.get_start_method() != "fork":
        logger.info("nothing is kept in memory: workers that are not forked would each have a copy")
        return
    kept = train_set.keep(int(args.cache_gib * 2**30))
    if kept < len(train_set):
        logger.info("%d of %d training samples fit into --cache_gib %g", kept, len(train_set), args.cache_gib)


def _read_through(volumes: Sequence[Volume], dataset: Dataset, num_classes: int) -> list[str]:
    """Find a damaged volume before anything is predicted or written; returns what cannot be right about the first."""
    first = volumes[0]
    doubts = [f"{first.name}: {doubt}" for doubt in dataset.doubts(first.label, num_classes)]
    del first  # one volume at a time
    for i in range(1, len(volumes)):
        _ = volumes[i].name
    return doubts


def _pretrained(
    args: Namespace, options: dict, default_weights: Callable[[str, dict], str | Path | None]
) -> str | Path | None:
    if args.pretrained == "none":
        return None
    return default_weights(args.network, options) if args.pretrained is None else args.pretrained
