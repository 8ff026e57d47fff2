"""Define the arguments that all training scripts share, and the arguments that all test scripts share.

The defaults are the paper's numbers. The defaults of a network are in its signature; those of training are here.
"""

import inspect
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from datasets import DATASETS, DatasetInfo, custom
from datasets.lists import PATTERN_HELP
from networks import CHOICES, DEFAULT_NETWORK, NETWORKS, VARIANTS, build
from utils.checkpoint import load_checkpoint, network_arguments_of
from utils.cli import AMP_DTYPES, ArgumentParser, number
from utils.errors import RunError

logger = logging.getLogger(__name__)

VARIANT_DEFAULTS = {variant: {"select": "val", "select_from_epoch": 1} for variant in VARIANTS}
VARIANT_DEFAULTS["release"] = {"select": "test", "select_from_epoch": 100}  # as the authors' program does
NETWORK_HELP = {
    "img_size": "side of the network's input in pixels, a multiple of 32",
    "img_size_dmwla": "side of the DMW-LA encoder's image",
    "model_scale": "size of MaxViT; the paper's is small",
    "variant": "release: compute what the authors' program computes; stable: gates and attention read normalised "
    "features, DS-GIM's norms have no running statistics; for random weights, or learning rates above the paper's",
    "feature_dim": "memory width d in the encoder",
    "num_clusters": "clusters in the encoder; default: num_classes",
    "decoder_feature_dim": "memory width d in the decoder",
    "decoder_num_clusters": "clusters in the decoder",
    "columns_per_cluster": "M, columns of each cluster in the memory",
    "pool_momentum": "weight of a key when it is blended into a column",
    "phi_k_momentum": "share of phi_k that an update keeps",
    "replaced_columns": "K at the start: columns of each cluster that a step renews; a K above M has the effect of M",
    "warmup_iterations": "iterations before the memory is used",
    "attention": "plain: no DMW-LA; intra_cluster: DMW-LA without its global part",
    "dsgim": "similarities that DS-GIM uses; none: no DS-GIM",
    "encoders": "encoders of the network",
    "gate": "none: the DMW-LA encoder sees the whole image",
    "loss": "subset: loss of all combinations of the four logit maps; last: loss of the last map alone",
    "prediction": "sum: sum of the four logit maps, as in the paper; last: the last and finest map alone",
}
"""Help for the flags that are arguments of ``SimMPNet``; their defaults are in its signature."""


def training_parser(description: str, info: DatasetInfo, **defaults: Any) -> ArgumentParser:
    """Return the parser of a training script. ``defaults`` are those of this data set, such as ``feature_dim=128``."""
    parser = ArgumentParser(description=description)
    count, some = number(int, 1), number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--root_path", type=Path, help="folder of the training slices, or of the images and masks")
    if not info.planar:
        add("--volume_path", type=Path, help="folder of the volumes")
    add("--list_dir", type=Path, help="folder of the lists that define the splits")
    add("--select", choices=["val", "test"], help="cases to choose the best epoch on; default: val, for release: test")
    add("--train_split", help="list to train on; default: given by --select")
    add("--val_split", help="list to choose the best epoch on; default: given by --select")
    add("--num_classes", type=count, help="number of classes, background included")
    add("--class_names", nargs="+", help="names of label ids 1, 2, ..., if the files do not name them")
    add("--patient_pattern", default=info.patient_pattern, help=PATTERN_HELP)
    if info.planar:
        add("--photometric", action="store_true", help="augment colours, focus and shape too")
    add("--num_workers", type=number(int, 0), default=2, help="processes that prepare samples")
    add("--cache_gib", type=some, default=4.0, help="keep up to this many GiB of the data in memory")

    add = add_network = parser.add_argument_group("network").add_argument
    add("--network", default=DEFAULT_NETWORK, choices=NETWORKS, help="network to train")
    text = "a file, hub (download) or none (random); default: the file in pretrained_pth/maxvit; other networks: hub"
    add("--pretrained", help=f"ImageNet weights of the encoder: {text}")
    add("--init_from", type=Path, help="checkpoint whose network and weights a new run starts from, such as a best.pth")
    add("--wld", default="loss", choices=["loss", "none"], help="loss: W-LD sets K by the loss; none: K never changes")
    add("--wld_start_epoch", type=int, default=100, help="first epoch in which W-LD sets K")

    add = parser.add_argument_group("training").add_argument
    add("--max_epochs", type=count, default=300, help="epochs of the whole run")
    add("--max_iterations", type=count, help="end the run after this many iterations")
    add("--batch_size", type=count, default=20, help="samples in a batch of one process")
    add("--accumulate", type=count, default=1, help="number of parts in which a batch is computed, to save memory")
    add("--base_lr", type=some, default=1e-4, help="learning rate of AdamW at the start")
    add("--lr_schedule", default="constant", choices=["constant", "poly", "cosine"], help="learning rate over the run")
    add("--weight_decay", type=some, default=1e-4, help="weight decay of AdamW")
    add("--ce_weight", type=some, default=0.3, help="weight of the cross entropy")
    add("--dice_weight", type=some, default=0.7, help="weight of the Dice loss")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=Path, help="run folder")
    add("--resume", type=Path, help="last.pth to continue from; auto: the one in --output_dir, if it exists")
    add("--checkpoint_minutes", type=some, default=10, help="also save every N minutes within an epoch; 0: never")
    add("--checkpoint_iterations", type=count, help="also save every N iterations")
    add("--keep", type=number(int, 0), default=0, help="number of newest epochs to keep, as epoch_0001.pth and so on")
    add("--eval_interval", type=count, default=1, help="validate every N epochs")
    add("--eval_batch_size", type=count, default=20, help="slices to predict at a time")
    add("--select_from_epoch", type=int, help="first epoch that can be the best; default: 1, for release: 100")
    add("--compile", action="store_true", help="torch.compile the training steps, for a GPU")
    add("--sync_bn", action="store_true", help="share BatchNorm's statistics between GPUs under torchrun")
    _add_shared(add, info)

    known = {"num_classes", "in_channels", *vars(parser.parse_args([]))}
    for network in NETWORKS:
        for name, default in network_defaults(network).items():
            if name in known:
                continue
            kind = int if default is None else type(default)
            if name in NETWORK_HELP and kind is not str:
                kind = number(float, 0, 1) if kind is float else number(int, 0 if name == "replaced_columns" else 1)
            text = NETWORK_HELP.get(name, f"argument of network {network}")
            add_network(f"--{name}", type=kind, default=default, choices=CHOICES.get(name), help=text)
            known.add(name)
    folders = {"root_path": info.root_path, "volume_path": info.volume_path, "list_dir": info.list_dir}
    own = {"in_channels": len(info.channels), "num_classes": info.num_classes, "output_dir": run_folder(info)}
    parser.set_defaults(**own | folders | defaults)
    return parser


def run_folder(info: DatasetInfo) -> str:
    """Return the folder that a data set's training writes to and its test reads from, if no flag says otherwise."""
    return f"runs/{info.name}{_of_fold(info.fold)}"


def _of_fold(fold: int | None) -> str:
    return f"_fold{fold}" if fold else ""  # no suffix for fold 0, which is the default of --fold


def own_data(*resume: str) -> Iterator[tuple[DatasetInfo, list[str]]]:
    """Yield, for each fold that ``--fold`` names, the facts of the folder ``--data`` and the fold's command line.

    With ``--fold all``, each fold has output folders of its own and gets the flags ``resume``. Raises RunError if
    ``--data`` is missing or ``--fold`` is wrong, and DataError if the folder or the fold does not exist.
    """
    argv = sys.argv[1:]
    first = ArgumentParser(add_help=False)
    first.add_argument("--data")
    first.add_argument("--fold", default="0")
    for name in ("--output_dir", "--checkpoint", "--test_save_dir"):
        first.add_argument(name, type=Path)
    known, others = first.parse_known_args(argv)
    if known.data is None:
        if not {"-h", "--help"} & {*argv}:
            raise RunError("--data FOLDER is missing: give a folder that prepare_data.py custom wrote")
        yield custom.INFO, argv
    elif known.fold != "all":
        if not known.fold.isdecimal():
            raise RunError(f"--fold {known.fold}: expected a number from 0, or all")
        yield custom.info_of(known.data, int(known.fold)), argv
    else:
        for fold in range(custom.info_of(known.data).folds):
            flags = ["--data", known.data, "--fold", str(fold)]
            for name in ("output_dir", "checkpoint", "test_save_dir"):
                if (path := getattr(known, name)) is not None:
                    if {path.name, path.parent.name} & {"", ".."}:  # `.` and the folder of `best.pth` have no name
                        path = Path(os.path.abspath(path))
                    folder = path.parent if path.suffix == ".pth" else path
                    own = folder.with_name(folder.name + _of_fold(fold))
                    flags += [f"--{name}", str(own / path.relative_to(folder))]
            yield custom.info_of(known.data, fold), [*resume, *others, *flags]


def testing_parser(description: str, info: DatasetInfo) -> ArgumentParser:
    """Return the parser of a test script."""
    parser = ArgumentParser(description=description)
    add, best = parser.add_argument, Path(run_folder(info), "best.pth")
    add("--checkpoint", type=Path, default=best, help="best.pth of a run, or a checkpoint of the authors' release")
    own = "default: the folder of the checkpoint's training, if it exists here, else the data set's own"
    add("--list_dir", type=Path, help=f"folder of the lists; {own}")
    add("--split", default=info.splits[-1], help="list to test on")
    if info.planar:
        add("--root_path", type=Path, help=f"folder of images and masks; {own}")
        saving = ("--save_masks", "save predictions as PNG")
    else:
        add("--volume_path", type=Path, help=f"folder of the volumes; {own}")
        add("--cases", nargs="+", help="test only these patients of the list (as case0005); results in cases_SPLIT")
        saving = ("--is_savenii", "save images, labels and predictions as NIfTI")
    add(saving[0], dest="save_predictions", action="store_true", help=saving[1])
    add("--overlays", type=number(int, 0), default=0, help="PNGs per volume, of the slices with the most errors")
    add("--batch_size", type=number(int, 1), default=20, help="slices to predict at a time")
    add("--test_save_dir", type=Path, help="folder of the results; default: next to the checkpoint")
    add_prediction(add)
    _add_shared(add, info)
    return parser


def add_prediction(add: Callable[..., Any]) -> None:
    """Add the flag that replaces the ``prediction`` of a trained network."""
    add("--prediction", choices=CHOICES["prediction"], help=f"{NETWORK_HELP['prediction']}; default: as in training")


def _add_shared(add: Callable[..., Any], info: DatasetInfo) -> None:
    """Add the flags that training and testing share."""
    if info.fold is not None:
        add("--data", default=info.folder, help="folder that prepare_data.py custom wrote")
        add("--fold", type=int, default=info.fold, help="fold whose lists are used, from 0; all: each fold in turn")
    if info.label_orders:
        text = f"meaning of the files' label ids; default: {next(iter(info.label_orders))}; in a test: as in training"
        add("--label_order", choices=info.label_orders, help=text)
    add("--seed", type=int, default=2222, help="seed of all random numbers")
    add("--deterministic", type=int, default=1, choices=[0, 1], help="1: repeatable, 0: faster")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    add("--n_gpu", type=number(int, 0), default=1, help="0: the CPU, 1: one GPU if there is one")
    add("--amp", default="none", choices=AMP_DTYPES, help="bf16, fp16: autocast; tf32: TensorFloat-32; none: float32")


def parse_training(
    parser: ArgumentParser, info: DatasetInfo, argv: list[str] | None = None
) -> tuple[Namespace, dict[str, Any] | None]:
    """Return the merged arguments, and the checkpoint that the run continues or starts from.

    Precedence: command line, checkpoint, defaults. Raises RunError if arguments contradict each other or the
    checkpoint, or if the run folder holds another run; NetworkError if no network can be built with them.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, checkpoint = parser.parse_args(argv), None
    last = Path(args.output_dir, "last.pth")
    automatic = args.resume == Path("auto")
    if automatic:
        args.resume = last if last.exists() else None
    if args.resume is not None:
        args, checkpoint = _resume(parser, info, argv, args.resume)
    elif old := [path for name in ("best.pth", "epoch_*.pth", "last.pth") for path in sorted(last.parent.glob(name))]:
        newest = "auto" if last.exists() else old[-1]
        remedy = f"continue it with --resume {newest}, or choose another --output_dir"
        raise RunError(f"{last.parent} holds checkpoints of a run: {remedy}")
    elif automatic:
        logger.info("--resume auto: there is no %s yet, so a new run starts", last)
    if checkpoint is None and args.init_from is not None:
        if args.pretrained not in (None, "none"):
            raise RunError(f"--pretrained and --init_from {args.init_from} both give weights: leave one of them out")
        checkpoint = load_checkpoint(args.init_from)
        saved = network_arguments_of(checkpoint, args.init_from)
        # The data determine these three; by default there is a cluster for each class.
        saved = {k: v for k, v in saved.items() if k not in ("num_classes", "in_channels", "num_clusters")}
        parser.set_defaults(**saved | VARIANT_DEFAULTS[args.variant])  # only the flags decide how to select
        args = parser.parse_args(argv)
        args.resume = None

    typed = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    foreign = flags_of_others()[args.network] & typed
    if args.pretrained == "none":
        foreign.discard("pretrained")  # also correct for a network without pretrained weights
    if foreign:
        flags = ", ".join(f"--{flag}" for flag in sorted(foreign))
        raise RunError(f"--network {args.network} does not take {flags}: leave them out")
    if args.batch_size % args.accumulate:
        raise RunError(
            f"--accumulate {args.accumulate} does not divide --batch_size {args.batch_size}: change one of them"
        )
    check_n_gpu(args)
    if args.num_clusters is None:
        args.num_clusters = args.num_classes
    for name, value in VARIANT_DEFAULTS[args.variant].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    train_split, val_split = info.selections[args.select]
    args.train_split = args.train_split or train_split
    args.val_split = args.val_split or val_split
    if "val_cases" in typed and args.val_split != args.train_split:
        raise RunError(f"--val_cases needs --val_split {args.train_split}, found {args.val_split}: omit --val_cases")
    args.selected_on = "test" if args.val_split == info.selections["test"][1] else "val"
    with torch.device("meta"):  # takes no memory: only to find sizes that do not fit before data are read
        build(args.network, **network_arguments(args))
    return args, checkpoint


def network_defaults(network: str) -> dict[str, Any]:
    """Return the arguments that a network takes, with their defaults; None stands for no default."""
    parameters = inspect.signature(NETWORKS[network]).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.name != "pretrained"}


def network_arguments(args: Namespace) -> dict[str, Any]:
    """Return the arguments with which the network is built."""
    return {name: getattr(args, name) for name in network_defaults(args.network)}


def flags_of_others() -> dict[str, set[str]]:
    """Return, for each network, the training arguments that only other networks take."""
    takes = {name: set(inspect.signature(network).parameters) for name, network in NETWORKS.items()}
    for parameters in takes.values():
        if "replaced_columns" in parameters:
            parameters |= {"wld", "wld_start_epoch"}  # arguments of the training loop, for networks with a memory
    return {name: set().union(*takes.values()) - parameters for name, parameters in takes.items()}


def check_n_gpu(args: Namespace) -> None:
    """Let ``--n_gpu 0`` mean the CPU; raise RunError if it contradicts ``--device``, or is not 0 or 1."""
    if args.n_gpu not in (0, 1):  # DataParallel would lose what its replicas write into their memory
        raise RunError(
            f"--n_gpu {args.n_gpu}: expected 0 or 1; to train on several GPUs, start one process per GPU with "
            f"torchrun --nproc_per_node {args.n_gpu} (docs/several_gpus.md)"
        )
    if args.n_gpu == 0:
        if args.device not in ("auto", "cpu"):
            raise RunError(f"--n_gpu 0 contradicts --device {args.device}: leave one of them out")
        args.device = "cpu"


def script_of(what: str, dataset: str) -> str:
    """Return the script that trains or tests on a data set."""
    return f"{what}_{dataset}.py" if dataset in DATASETS else f"{what}_custom.py and its --data"


def _resume(parser: ArgumentParser, info: DatasetInfo, argv: list[str], path: Path) -> tuple[Namespace, dict[str, Any]]:
    """Return the arguments merged with those of the checkpoint at ``path``, and the checkpoint."""
    try:
        checkpoint = load_checkpoint(path)
    except RunError as error:
        remedy = f"; try --resume {path.with_name('best.pth')} or an epoch_*.pth, or start anew in another --output_dir"
        raise RunError(f"{error}{remedy if path.is_file() else ''}") from error
    if not {"optimizer", "args", "in_epoch"} <= checkpoint.keys():
        raise RunError(f"{path} is not a training checkpoint: give the last.pth of a run")
    if (dataset := checkpoint["data"]["dataset"]) != info.name:
        raise RunError(
            f"{path} is a run on {dataset}: resume it with {script_of('train', dataset)}, or start a run in another "
            "--output_dir"
        )
    saved = checkpoint["args"] | {"resume": None, "output_dir": str(path.parent)}
    if any(word.startswith(("--device", "--n_gpu")) for word in argv):  # either flag replaces both
        saved = {name: value for name, value in saved.items() if name not in ("device", "n_gpu")}
    if info.fold is not None:  # the folder may have moved: its subfolders are now in --data
        for name in ("root_path", "volume_path", "list_dir"):
            with suppress(ValueError):  # ValueError: a flag gave a path outside it
                saved[name] = str(Path(info.folder, Path(saved[name]).relative_to(saved["data"])))
        saved["data"] = info.folder
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.resume = path
    if args.output_dir.resolve() == path.parent.resolve():
        args.output_dir = path.parent

    network = network_arguments_of(checkpoint, path)
    fixed = network_defaults(network["network"]) | network  # an old checkpoint lacks new arguments
    others = ("seed", "select", "select_from_epoch", "pretrained", "init_from", "label_order", "fold", "output_dir")
    fixed |= {name: saved.get(name) for name in others}
    defaults = {"num_clusters": args.num_classes, "label_order": next(iter(info.label_orders), None)}
    for name, value in fixed.items():
        given, before = (defaults.get(name) if x is None else x for x in (getattr(args, name, None), value))
        if str(given) != str(before):
            raise RunError(f"--{name} {given} does not fit {path}, whose run has --{name} {before}: leave it out")
    later = [path.with_name(name) for name in ("last.pth", "best.pth")] if path.name != "last.pth" else []
    for other in later:
        newest = 0
        with suppress(RunError, KeyError):  # missing, or damaged
            newest = load_checkpoint(other)["iteration"] if other != path else 0
        if newest > checkpoint["iteration"]:
            raise RunError(f"{path} is older than {other} of the same run: resume from the newer file, or move it away")
    ends = args.max_iterations
    if ends and ends <= checkpoint["iteration"] and saved["max_epochs"] != args.max_epochs > checkpoint["epoch"]:
        raise RunError(f"--max_epochs {args.max_epochs}: --max_iterations {ends} ended the run: raise it too")
    return args, checkpoint
