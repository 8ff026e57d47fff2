"""The arguments that the training and the test scripts share.

The paper's numbers are their defaults: those of the network stand in its signature, those of training here.
"""

import inspect
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from utils.checkpoint import load_checkpoint
from utils.cli import AMP_DTYPES, ArgumentParser
from utils.errors import RunError

logger = logging.getLogger(__name__)

# What a variant chooses where the user has not: the release selects on the test volumes, late.
VARIANT_DEFAULTS = {
    "paper": {"select": "val", "select_from_epoch": 1},
    "release": {"select": "test", "select_from_epoch": 100},
}
Splits = Mapping[str, tuple[str, str]]
"""For each choice of ``--select`` the lists to train on and to choose the best epoch on."""
Networks = Mapping[str, Callable[..., Any]]
"""For each choice of ``--network`` what builds it: `networks.NETWORKS`."""


class Dataset(Protocol):
    """What this room asks of a data set's facts; `datasets.DatasetInfo` has it."""

    name: str
    class_names: tuple[str, ...]
    list_dir: str
    splits: tuple[str, ...]
    label_orders: Mapping[str, Any]
    root_path: str
    volume_path: str
    num_classes: int
    planar: bool
    preprocessing: Any

    def names_for(self, num_classes: int) -> tuple[str, ...]: ...

    def doubts(self, label: Any, num_classes: int) -> list[str]: ...


def training_parser(description: str, networks: Networks, dataset: Dataset, **defaults: Any) -> ArgumentParser:
    """Return the parser of a training script.

    Args:
        description: the script's docstring.
        networks: what can be trained, the default first, whose arguments have its defaults. An argument that only
            another one takes is added as a flag.
        dataset: what is trained on.
        defaults: what the data set changes.
    """
    parser = ArgumentParser(description=description)

    data = parser.add_argument_group("data")
    if dataset.planar:
        data.add_argument("--root_path", type=Path, help="folder that holds images and masks")
    else:
        data.add_argument("--root_path", type=Path, help="folder of the training slices")
        data.add_argument("--volume_path", type=Path, help="folder of the volumes")
    data.add_argument("--list_dir", type=Path, help="folder of the lists that make the splits")
    data.add_argument(
        "--select",
        choices=["val", "test"],
        help="what the best epoch is chosen on: validation patients, or the test volumes, as papers of this family do "
        "and every table then says; default: val, or test in the variant release",
    )
    data.add_argument("--train_split", help="list to train on; default: by --select")
    data.add_argument("--val_split", help="list to choose the best epoch on; default: by --select")
    data.add_argument("--num_classes", type=int, help="classes with background")
    data.add_argument("--img_size", type=int, help="side of the network's image, a multiple of 32")
    _add_label_order(data, dataset)
    if dataset.planar:
        data.add_argument(
            "--photometric", action="store_true", help="vary brightness, contrast, saturation, hue, focus and form too"
        )
    data.add_argument("--num_workers", type=int, default=2, help="processes that prepare slices")
    data.add_argument(
        "--cache_gib", type=float, default=4.0, help="memory for what was read, so that files are read once; 0: none"
    )

    model = parser.add_argument_group("network")
    first = next(iter(networks))
    model.add_argument(
        "--network", default=first, choices=networks, help="what is trained; a flag that another one has is refused"
    )
    model.add_argument("--attention", help="dmwla, plain (without DMW-LA), or intra_cluster (without the global one)")
    model.add_argument("--dsgim", help="both similarities, only cosine, only euclidean, or none: no DS-GIM")
    model.add_argument("--encoders", help="both, only maxvit, or only dmwla")
    model.add_argument("--gate", help="learned, or none: the DMW-LA encoder sees the image ungated")
    model.add_argument("--loss", help="subset: of all combinations of the four maps; last: of the last layer's alone")
    model.add_argument(
        "--variant", choices=list(VARIANT_DEFAULTS), help="release computes what the authors' program does"
    )
    model.add_argument("--model_scale", help="pico, nano, tiny, small (the paper's) or base")
    model.add_argument("--img_size_dmwla", type=int, help="side of the DMW-LA encoder's image")
    model.add_argument(
        "--pretrained",
        help="ImageNet weights of the encoder: a file (MaxViT), hub (the library's download), or none for random "
        "weights; default: the file of the scale in pretrained_pth/maxvit, hub, or none where nobody published any",
    )
    model.add_argument("--feature_dim", type=int, help="memory width d in the encoder")
    model.add_argument("--num_clusters", type=int, help="clusters in the encoder; default: num_classes")
    model.add_argument("--decoder_feature_dim", type=int, help="memory width d in the decoder")
    model.add_argument("--decoder_num_clusters", type=int, help="clusters in the decoder")
    model.add_argument("--columns_per_cluster", type=int, help="M, remembered columns per cluster")
    model.add_argument("--pool_momentum", type=float, help="weight of a key blended into a column")
    model.add_argument("--phi_k_momentum", type=float, help="share of phi_k that an update keeps")
    model.add_argument("--replaced_columns", type=int, help="K, before W-LD changes it; never more than M are")
    model.add_argument("--warmup_iterations", type=int, help="iterations before the memory is used")
    model.add_argument("--wld", default="loss", choices=["loss", "none"], help="how K changes: by the loss, or never")
    model.add_argument("--wld_start_epoch", type=int, default=100, help="first epoch in which W-LD changes K")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--max_epochs", type=int, default=300, help="epochs of the whole run")
    optimisation.add_argument(
        "--max_iterations",
        type=int,
        help="of the whole run, learning rates too; it may end in mid-epoch, and resuming then starts the next",
    )
    optimisation.add_argument("--batch_size", type=int, default=20, help="slices in a batch, of each process")
    optimisation.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="parts that a batch is computed in, one after the other, where the memory is short",
    )
    optimisation.add_argument("--base_lr", type=float, default=1e-4, help="learning rate of AdamW at the start")
    optimisation.add_argument(
        "--lr_schedule", default="constant", choices=["constant", "poly", "cosine"], help="over all iterations"
    )
    optimisation.add_argument("--weight_decay", type=float, default=1e-4, help="of AdamW")
    optimisation.add_argument("--ce_weight", type=float, default=0.3, help="weight of the cross entropy")
    optimisation.add_argument("--dice_weight", type=float, default=0.7, help="weight of the Dice loss")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, help="run folder")
    run.add_argument(
        "--resume",
        type=Path,
        help="last.pth to go on from, its arguments become the defaults; auto: that of --output_dir, if there is one",
    )
    run.add_argument(
        "--checkpoint_minutes", type=float, default=10, help="save in mid-epoch so often; 0: when an epoch ends"
    )
    run.add_argument("--checkpoint_iterations", type=int, help="save in mid-epoch so often too")
    run.add_argument("--keep", type=int, default=0, help="checkpoints of the newest epochs kept, as epoch_0001.pth")
    run.add_argument("--eval_interval", type=int, default=1, help="epochs from one validation to the next")
    run.add_argument("--eval_batch_size", type=int, default=20, help="slices predicted at a time")
    run.add_argument("--select_from_epoch", type=int, help="first epoch that may be the best; default 1, release 100")
    run.add_argument("--seed", type=int, default=2222, help="of everything random")
    run.add_argument(
        "--deterministic", type=int, default=1, choices=[0, 1], help="1: repeat exactly, 0: as fast as can be"
    )
    run.add_argument(
        "--compile", action="store_true", help="torch.compile the steps after the warm-up; minutes first, for a GPU"
    )
    run.add_argument("--sync_bn", action="store_true", help="BatchNorm over the batches of all GPUs under torchrun")
    _add_device(run)
    folders = {"root_path": dataset.root_path, "volume_path": dataset.volume_path, "list_dir": dataset.list_dir}
    facts = folders | {"num_classes": dataset.num_classes, "pretrained": None}
    known = network_defaults(networks[first])
    for name, network in networks.items():
        for option, default in network_defaults(network).items():
            if option not in {*known, *vars(parser.parse_args([]))}:
                kind = {bool: int, type(None): str}.get(type(default), type(default))
                model.add_argument(f"--{option}", type=kind, default=default, help=f"of {name}")
    parser.set_defaults(**known | facts | defaults)
    return parser


def testing_parser(description: str, dataset: Dataset) -> ArgumentParser:
    """Return the parser of the script that tests on a data set."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    if dataset.planar:
        parser.add_argument("--root_path", type=Path, default=dataset.root_path, help="folder of images and masks")
    else:
        parser.add_argument("--volume_path", type=Path, default=dataset.volume_path, help="folder of the volumes")
    parser.add_argument("--list_dir", type=Path, default=dataset.list_dir, help="folder of the lists")
    parser.add_argument("--split", default=dataset.splits[-1], help="list to test on")
    if not dataset.planar:
        parser.add_argument("--cases", nargs="+", help="only these patients of the list (case0005)")
    parser.add_argument("--batch_size", type=int, default=20, help="slices predicted at a time")
    parser.add_argument(
        "--test_save_dir", type=Path, help="folder of the results; default: results_SPLIT beside the checkpoint"
    )
    saving = (
        ("--save_masks", "save predictions as PNG")
        if dataset.planar
        else ("--is_savenii", "save image, label and prediction as NIfTI")
    )
    parser.add_argument(saving[0], dest="save_predictions", action="store_true", help=saving[1])
    parser.add_argument("--overlays", type=int, default=0, help="PNGs per volume, of the slices with most error")
    parser.add_argument("--seed", type=int, default=2222, help="of everything random")
    parser.add_argument("--deterministic", type=int, default=1, choices=[0, 1], help="1: repeat exactly")
    _add_label_order(parser, dataset)
    _add_device(parser)
    return parser


def parse_training(
    parser: ArgumentParser, networks: Networks, splits: Splits, argv: list[str] | None = None
) -> tuple[Namespace, dict | None]:
    """Return the merged arguments and, when resuming, the checkpoint.

    splits: the lists for each choice of ``--select``. What is typed wins over the checkpoint's arguments, and those
    over the defaults. What would make another network
    than the checkpoint's, or write over another run, is refused.

    Raises:
        RunError: as above, or the checkpoint cannot be read or was not written by training.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, checkpoint = parser.parse_args(argv), None
    last = Path(args.output_dir) / "last.pth"
    resume = args.resume
    if resume == Path("auto"):
        resume = args.resume = last if last.exists() else None
        if resume is None:
            logger.info("--resume auto: there is no %s, so this is the start of a run", last)
    if resume is not None:
        try:
            checkpoint = load_checkpoint(resume)
        except RunError as error:
            raise RunError(
                f"{error}; of its run, --resume {resume.with_name('best.pth')} or an epoch_*.pth may be whole, "
                "or delete it to start anew"
            ) from error
        if not {"optimizer", "args", "in_epoch"} <= checkpoint.keys():
            raise RunError(f"{resume} is not a training checkpoint of this version: resume from a last.pth")
        saved = {name: value for name, value in checkpoint["args"].items() if name != "resume"}
        parser.set_defaults(**saved | {"output_dir": str(resume.parent)})
        args = parser.parse_args(argv)
        args.resume = resume
        name = checkpoint["network"].get("network", next(iter(networks)))
        if not isinstance(name, str) or name not in networks:
            raise RunError(f"{resume} holds a network unknown here, {name!r}: import its file in networks/__init__.py")
        # an older checkpoint does not know every argument
        trained = {"network": name} | network_defaults(networks[name]) | checkpoint["network"]
        _check_resumed(args, saved, trained, checkpoint["iteration"])
    elif last.exists():
        raise RunError(
            f"{args.output_dir} holds a run already: go on with --resume auto, or choose another --output_dir"
        )
    _check_flags_of(args.network, networks, _typed(parser, argv), args.pretrained)
    if args.num_clusters is None:
        args.num_clusters = args.num_classes
    for name, value in VARIANT_DEFAULTS[args.variant].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    train_split, val_split = splits[args.select]
    args.train_split = args.train_split or train_split
    args.val_split = args.val_split or val_split
    args.selected_on = "test" if args.val_split == splits["test"][1] else "val"
    _check_numbers(args)
    check_n_gpu(args)
    return args, checkpoint


def network_defaults(network: Callable) -> dict[str, Any]:
    """Return the arguments that a network takes, with their defaults; one without a default has None."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.name != "pretrained"}


def network_arguments(args: Namespace, networks: Networks) -> dict[str, Any]:
    """Return those of the arguments that build the network."""
    return {name: getattr(args, name) for name in network_defaults(networks[args.network])}


def flags_of_others(networks: Networks) -> dict[str, set[str]]:
    """Return for each network the training arguments that are only for others."""
    takes = {name: set(inspect.signature(network).parameters) for name, network in networks.items()}
    for parameters in takes.values():
        if "replaced_columns" in parameters:
            parameters |= {"wld", "wld_start_epoch"}  # of the loop, for a memory
    return {name: set().union(*takes.values()) - parameters for name, parameters in takes.items()}


def check_n_gpu(args: Namespace) -> None:
    """Refuse more than one GPU; none means the CPU.

    Raises:
        RunError: ``--n_gpu`` is above 1 (DataParallel would lose what its replicas write into their memory banks), or
            is 0 beside a GPU asked for by name.
    """
    if args.n_gpu not in (0, 1):
        raise RunError(
            f"--n_gpu is {args.n_gpu}; a process has one GPU: leave it out, and start one process per GPU with "
            f"torchrun --nproc_per_node {args.n_gpu} (docs/several_gpus.md)"
        )
    if args.n_gpu == 0:
        if args.device not in ("auto", "cpu"):
            raise RunError(f"--n_gpu is 0 and --device is {args.device}; leave one of them out")
        args.device = "cpu"


def _add_label_order(group, dataset: Dataset) -> None:
    if dataset.label_orders:
        first = next(iter(dataset.label_orders))
        group.add_argument(
            "--label_order", choices=dataset.label_orders, help=f"what the files' label ids mean; default: {first}"
        )


def _add_device(group) -> None:
    group.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    group.add_argument("--n_gpu", type=int, default=1, help="0: the CPU, 1: one GPU if there is one")
    group.add_argument("--amp", default="none", choices=AMP_DTYPES, help="autocast precision, or TensorFloat-32")


def _check_resumed(args: Namespace, saved: dict[str, Any], trained: dict[str, Any], iteration: int) -> None:
    """Refuse what a resumed run cannot follow."""
    for name, value in trained.items():
        typed = args.num_classes if name == "num_clusters" and args.num_clusters is None else getattr(args, name)
        if typed != value:
            raise RunError(
                f"--{name} {typed} does not fit {args.resume}, which was trained with {value}: "
                "leave it out, or train anew into another --output_dir"
            )
    if args.select != saved["select"]:
        raise RunError(
            f"--select {args.select} does not fit {args.resume}, trained with {saved['select']}: leave it out"
        )
    if args.pretrained != saved["pretrained"]:
        raise RunError(f"--pretrained {args.pretrained} has no use beside --resume {args.resume}: leave it out")
    last = args.resume.with_name("last.pth")
    if args.resume.name != last.name and _iteration_of(last) > iteration:
        raise RunError(f"{args.resume} is older than {last}, which would be lost: resume from that, or move it away")
    if Path(args.output_dir).resolve() != args.resume.resolve().parent:
        raise RunError(
            f"--output_dir {args.output_dir} is not the folder of {args.resume}, where its run goes on: leave it out"
        )


def _iteration_of(path: Path) -> int:
    """Return the iteration of a checkpoint, 0 where it is missing or damaged and nothing would be lost."""
    try:
        return load_checkpoint(path)["iteration"]
    except (RunError, KeyError):
        return 0


def _typed(parser: ArgumentParser, argv: list[str]) -> set[str]:
    """Return the names of the arguments that the user has typed."""
    untouched = object()
    blank = Namespace(**dict.fromkeys(vars(parser.parse_args([])), untouched))
    return {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not untouched}


def _check_flags_of(name: str, networks: Networks, typed: set[str], pretrained: str | None) -> None:
    """Refuse what was typed for another network than the one of this name."""
    foreign = flags_of_others(networks)[name] & typed
    if pretrained == "none":
        foreign.discard("pretrained")  # true of it
    if foreign:
        flags = ", ".join(f"--{flag}" for flag in sorted(foreign))
        raise RunError(f"--network {name} does not take {flags}: leave that out")


def _check_numbers(args: Namespace) -> None:
    above_0 = ("max_epochs", "max_iterations", "batch_size", "base_lr", "eval_interval", "eval_batch_size")
    above_0 += ("columns_per_cluster", "feature_dim", "num_clusters", "decoder_feature_dim", "decoder_num_clusters")
    for name in (*above_0, "warmup_iterations", "accumulate", "checkpoint_iterations"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise RunError(f"--{name} is {value}; expected a number above 0")
    not_below_0 = ("replaced_columns", "num_workers", "cache_gib", "weight_decay", "ce_weight", "dice_weight")
    for name in (*not_below_0, "checkpoint_minutes", "keep"):
        if getattr(args, name) < 0:
            raise RunError(f"--{name} is {getattr(args, name)}; expected 0 or more")
    for name in ("pool_momentum", "phi_k_momentum"):
        if not 0 <= getattr(args, name) <= 1:
            raise RunError(f"--{name} is {getattr(args, name)}; expected a share from 0 to 1")
    if args.replaced_columns > args.columns_per_cluster:
        logger.warning(
            "--replaced_columns %d is more than --columns_per_cluster %d: a step replaces every column of a cluster",
            args.replaced_columns, args.columns_per_cluster,
        )  # fmt: skip
    if args.batch_size % args.accumulate:
        divisors = ", ".join(str(n) for n in range(1, args.batch_size + 1) if args.batch_size % n == 0)
        raise RunError(
            f"--accumulate {args.accumulate} does not divide --batch_size {args.batch_size} into parts of one size: "
            f"take one of {divisors}"
        )
