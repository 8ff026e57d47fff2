"""Train Sim-MPNet on Synapse, abdominal CT with eight organs.

python train_synapse.py    # the paper's settings; two training cases choose the best epoch
python train_synapse.py --select test --select_from_epoch 100    # the test volumes choose it, as papers do
python train_synapse.py --label_order transunet    # TransUNet's ready-made files
python train_synapse.py --network unet --output_dir runs/synapse_unet    # another network (docs/baselines.md)
torchrun --standalone --nproc_per_node 4 train_synapse.py --batch_size 5 --resume auto
"""

from datasets import DataError, SliceDataset, VolumeDataset, synapse
from networks import NetworkError
from utils.arguments import parse_training, training_parser
from utils.cli import run_script
from utils.launch import train
from utils.verify import quick_check

SPLITS = {"val": ("train", "train"), "test": ("train", "test_vol")}  # --select: lists to train and select on


def main() -> None:
    info = synapse.INFO
    parser = training_parser(__doc__, info, feature_dim=256)
    parser.add_argument("--val_cases", nargs="+", default=synapse.VALIDATION_CASES, help="held out for --select val")
    args, checkpoint = parse_training(parser, info, SPLITS)
    order = info.label_order(args.label_order, args.num_classes)
    held_out = args.val_cases if args.val_split == args.train_split else None
    val_path = args.root_path if held_out else args.volume_path  # training cases have slices only
    info.require(args.root_path, val_path)
    train_set = SliceDataset(args.root_path, args.list_dir, args.train_split, args.num_classes, args.img_size,
        augment=True, seed=args.seed, label_order=order, without=held_out or ())  # fmt: skip
    val_set = VolumeDataset(val_path, args.list_dir, args.val_split, args.num_classes, order, only=held_out)
    info = quick_check(train_set, val_set, info, args)
    train(args, checkpoint, info, train_set, val_set)


if __name__ == "__main__":
    run_script(main, DataError, NetworkError)
