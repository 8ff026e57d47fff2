"""Draw what training sees: augmented samples with their labels, in the colours of the classes.

    python -m utils.preview acdc --output preview.png
    python -m utils.preview isic --photometric --count 25
    python -m utils.preview segpc --root_path data/SegPC_crops --list_dir data/SegPC_crops/lists --split val

The samples are spread evenly over the split. If it has fewer samples than --count, they repeat with new augmentation.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import DataError, ImageDataset
from utils.cli import number, run_script
from utils.data_checks import Samples, open_samples
from utils.figures import add_legend, coloured, make_panels, save_figure
from utils.verify import data_parser, fill_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(dataset: Samples, class_names: Sequence[str], count: int) -> "Figure":
    """Draw ``count`` samples as a square sheet with a legend of the classes."""
    figure, panels = make_panels(count, columns=math.ceil(math.sqrt(count)))
    for n, axes in enumerate(panels):
        epoch, index = divmod(n * max(count, len(dataset)) // count, len(dataset))
        dataset.set_epoch(epoch)
        sample = dataset[index]
        image = sample["image"].numpy()
        axes.imshow(dataset.preprocessing.denormalise(image) if isinstance(dataset, ImageDataset) else image[0], "gray")
        axes.imshow(coloured(sample["label"].numpy()), interpolation="nearest")
        axes.set_title(sample["name"], fontsize=7, parse_math=False)
        axes.axis("off")
    add_legend(figure, class_names)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the sheet that the command line asks for."""
    parser = data_parser("python -m utils.preview", __doc__)
    parser.add_argument("--split", default="train", help="list to draw from")
    parser.add_argument("--count", type=number(int, 1), default=16, help="number of samples")
    parser.add_argument("--photometric", action="store_true", help="augment colours, focus and shape (only for images)")
    parser.add_argument("--seed", type=number(int, 0), default=2222, help="seed of the augmentation")
    parser.add_argument("--img_size", type=number(int, 1), default=256, help="side of a sample, in pixels")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="PNG to write")
    args = parser.parse_args(argv)
    info = fill_in(args)
    options = {"img_size": args.img_size, "augment": True, "seed": args.seed}
    if args.photometric:
        if not info.planar:
            raise DataError(f"--photometric changes colours, but the scans of {info.name} are grey; leave it out")
        options["photometric"] = True
    samples = open_samples(info, args, args.split, **options)
    names = samples.open(0).class_names or info.names_for(args.num_classes)
    save_figure(draw(samples, names, args.count), args.output)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
