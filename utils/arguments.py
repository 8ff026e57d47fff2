"""The arguments that the training and the test scripts share; every number of the paper is a default here."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.checkpoint import load_checkpoint
from utils.cli import ArgumentParser
from utils.errors import RunError

# Arguments that SimMPNet takes under the same name.
NETWORK = (
    "num_classes",
    "in_channels",
    "img_size",
    "img_size_dmwla",
    "model_scale",
    "variant",
    "feature_dim",
    "num_clusters",
    "decoder_feature_dim",
    "decoder_num_clusters",
    "columns_per_cluster",
    "pool_momentum",
    "phi_k_momentum",
    "replaced_columns",
    "warmup_iterations",
)
# What a variant chooses where the user has not: the release selects on the test volumes, late.
VARIANT_DEFAULTS = {
    "paper": {"train_split": "train", "val_split": "val", "select_from_epoch": 1},
    "release": {"train_split": "trainval", "val_split": "test", "select_from_epoch": 100},
}


def training_parser(description: str, **defaults: Any) -> ArgumentParser:
    """Return the parser of a training script; ``defaults`` are what its data set changes."""
    parser = ArgumentParser(description=description)

    data = parser.add_argument_group("data")
    data.add_argument("--root_path", type=Path, help="folder of the training slices")
    data.add_argument("--volume_path", type=Path, help="folder of the volumes")
    data.add_argument("--list_dir", type=Path, help="folder of the lists that make the splits")
    data.add_argument("--train_split", help="list to train on; default: train, or trainval in the variant release")
    data.add_argument("--val_split", help="list to choose the best epoch on; default: val, or test in release")
    data.add_argument("--num_classes", type=int, help="classes with background")
    data.add_argument("--img_size", type=int, default=256, help="side of the network's image, a multiple of 32")
    data.add_argument("--num_workers", type=int, default=2, help="processes that prepare slices")

    network = parser.add_argument_group("network")
    network.add_argument("--variant", default="paper", help="paper, or release: as the authors' program computes")
    network.add_argument("--model_scale", default="small", help="pico, nano, tiny, small (the paper's) or base")
    network.add_argument("--img_size_dmwla", type=int, default=224, help="side of the DMW-LA encoder's image")
    network.add_argument("--in_channels", type=int, default=1, help="1 (grey) or 3 (colour)")
    network.add_argument(
        "--pretrained",
        help="ImageNet weights of the MaxViT encoder: a file, hub (timm's download), or none for random weights; "
        "default: the file of the scale in pretrained_pth/maxvit",
    )
    network.add_argument("--feature_dim", type=int, default=256, help="memory width d in the encoder")
    network.add_argument("--num_clusters", type=int, help="clusters in the encoder; default: num_classes")
    network.add_argument("--decoder_feature_dim", type=int, default=128, help="memory width d in the decoder")
    network.add_argument("--decoder_num_clusters", type=int, default=10, help="clusters in the decoder")
    network.add_argument("--columns_per_cluster", type=int, default=100, help="M, remembered columns per cluster")
    network.add_argument("--pool_momentum", type=float, default=0.3, help="weight of a key blended into a column")
    network.add_argument("--phi_k_momentum", type=float, default=0.95, help="share of phi_k that an update keeps")
    network.add_argument("--replaced_columns", type=int, default=50, help="K, before W-LD changes it")
    network.add_argument("--warmup_iterations", type=int, default=2000, help="iterations before the memory is used")
    network.add_argument("--wld_start_epoch", type=int, default=100, help="first epoch in which W-LD changes K")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--max_epochs", type=int, default=300)
    optimisation.add_argument("--max_iterations", type=int, help="stop here if it comes before --max_epochs")
    optimisation.add_argument("--batch_size", type=int, default=20)
    optimisation.add_argument("--base_lr", type=float, default=1e-4, help="learning rate of AdamW")
    optimisation.add_argument("--lr_schedule", default="constant", choices=["constant", "poly", "cosine"])
    optimisation.add_argument("--weight_decay", type=float, default=1e-4)
    optimisation.add_argument("--ce_weight", type=float, default=0.3, help="weight of the cross entropy")
    optimisation.add_argument("--dice_weight", type=float, default=0.7, help="weight of the Dice loss")

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, help="run folder")
    run.add_argument("--resume", type=Path, help="last.pth to go on from; its arguments become the defaults")
    run.add_argument("--eval_interval", type=int, default=1, help="epochs from one validation to the next")
    run.add_argument("--eval_batch_size", type=int, default=20, help="slices predicted at a time")
    run.add_argument("--select_from_epoch", type=int, help="first epoch that may be the best; default 1, release 100")
    run.add_argument("--seed", type=int, default=2222)
    run.add_argument(
        "--deterministic", type=int, default=1, choices=[0, 1], help="1: repeat exactly, 0: as fast as can be"
    )
    _add_device(run)
    parser.set_defaults(**defaults)
    return parser


def testing_parser(description: str, **defaults: Any) -> ArgumentParser:
    """Return the parser of a test script; ``defaults`` are what its data set changes."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run, or one of the release")
    parser.add_argument("--volume_path", type=Path, help="folder of the volumes")
    parser.add_argument("--list_dir", type=Path, help="folder of the lists")
    parser.add_argument("--split", default="test", help="list to test on")
    parser.add_argument("--batch_size", type=int, default=20, help="slices predicted at a time")
    parser.add_argument("--test_save_dir", type=Path, help="folder of the results; default: beside the checkpoint")
    parser.add_argument("--is_savenii", action="store_true", help="save image, label and prediction as NIfTI")
    parser.add_argument("--overlays", type=int, default=0, help="PNGs per volume, of the slices with most error")
    parser.add_argument("--seed", type=int, default=2222)
    parser.add_argument("--deterministic", type=int, default=1, choices=[0, 1])
    _add_device(parser)
    parser.set_defaults(**defaults)
    return parser


def parse_training(parser: ArgumentParser, argv: list[str] | None = None) -> tuple[Namespace, dict | None]:
    """Return the merged arguments and, when resuming, the checkpoint.

    What is typed wins over the checkpoint's arguments, and those over the defaults. What would make another
    network than the checkpoint's, or write into a folder that holds another run, is refused.

    Raises:
        RunError: as above, or the checkpoint cannot be read or was not written by training.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume is not None:
        checkpoint = load_checkpoint(args.resume)
        if "optimizer" not in checkpoint:
            raise RunError(f"{args.resume} is not a training checkpoint of this project: resume from a last.pth")
        saved = {name: value for name, value in checkpoint["args"].items() if name not in ("resume", "output_dir")}
        paths = {action.dest for action in parser._actions if action.type is Path}
        saved = {k: Path(v) if k in paths and v is not None else v for k, v in saved.items()}
        parser.set_defaults(**saved, output_dir=args.resume.parent)
        args = parser.parse_args(argv)
        args.num_clusters = args.num_clusters or args.num_classes
        for name in NETWORK:
            trained = checkpoint["network"][name]
            if getattr(args, name) != trained:
                raise RunError(
                    f"--{name} {getattr(args, name)} does not fit {args.resume}, which was trained with {trained}: "
                    "leave it out, or train anew without --resume"
                )
    elif (Path(args.output_dir) / "last.pth").exists():
        raise RunError(
            f"{args.output_dir} holds a run already: go on with --resume {args.output_dir}/last.pth, "
            "or choose another --output_dir"
        )
    args.num_clusters = args.num_clusters or args.num_classes
    for name, value in VARIANT_DEFAULTS.get(args.variant, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check_positive(args)
    check_n_gpu(args)
    return args, checkpoint


def network_arguments(args: Namespace) -> dict[str, Any]:
    """Return those of the arguments that build the network."""
    return {name: getattr(args, name) for name in NETWORK}


def check_n_gpu(args: Namespace) -> None:
    """Refuse more than one GPU; none means the CPU.

    Raises:
        RunError: ``--n_gpu`` is above 1: DataParallel would lose what its replicas write into their memory banks.
    """
    if args.n_gpu > 1:
        raise RunError(f"--n_gpu is {args.n_gpu}; training runs on one GPU: leave it at 1, or 0 for the CPU")
    if args.n_gpu == 0 and args.device == "auto":
        args.device = "cpu"


def _add_device(group) -> None:
    group.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    group.add_argument("--n_gpu", type=int, default=1, help="0: the CPU, 1: one GPU if there is one")
    group.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="autocast precision")


def _check_positive(args: Namespace) -> None:
    above_0 = ("max_epochs", "max_iterations", "batch_size", "base_lr", "eval_interval", "eval_batch_size")
    above_0 += ("columns_per_cluster", "feature_dim", "num_clusters", "decoder_feature_dim", "decoder_num_clusters")
    for name in above_0:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise RunError(f"--{name} is {getattr(args, name)}; expected a number above 0")
    for name in ("warmup_iterations", "replaced_columns", "num_workers", "weight_decay"):
        if getattr(args, name) < 0:
            raise RunError(f"--{name} is {getattr(args, name)}; expected 0 or more")
