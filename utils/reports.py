"""What accompanies a segmentation: the colours and names of its labels, and how large each organ is."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.figures import class_colour
from utils.files import atomic_write

Row = tuple[str, str, int, float]


def write_colour_tables(stem: str | Path, class_names: Sequence[str]) -> list[Path]:
    """Write names and colours of the label ids as `<stem>labels.ctbl` for 3D Slicer, `<stem>labels_itksnap.txt`.

    Colours are those of the overlays; background (0) is transparent. Gives the paths.
    Source: the colour table format of Slicer's user guide, the label description format of ITK-SNAP's.
    """
    entries = [(0, "background", (0, 0, 0))]
    entries += [(c, name, _rgb(class_colour(c))) for c, name in enumerate(class_names, 1)]
    slicer = ["# Color table file", f"# {len(entries)} values"]
    slicer += [f"{c} {name.replace(' ', '_')} {r} {g} {b} {255 if c else 0}" for c, name, (r, g, b) in entries]
    itksnap = ["# ITK-SnAP Label Description File", "# IDX -R- -G- -B- -A- VIS MSH LABEL"]
    for c, name, (r, g, b) in entries:
        seen = int(c > 0)
        quoted = name.replace('"', "'")
        itksnap.append(f'{c:5} {r:5} {g:4} {b:4} {seen:8} {seen:2} {seen:2}    "{quoted}"')
    paths = []
    for ending, lines in (("labels.ctbl", slicer), ("labels_itksnap.txt", itksnap)):
        paths.append(Path(f"{stem}{ending}"))
        with atomic_write(paths[-1]) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def organ_volumes(
    name: str, prediction: np.ndarray, class_names: Sequence[str], affine: np.ndarray | None
) -> list[Row]:
    """Give (scan, class, voxels, millilitres) for every class but the background; NaN ml without an affine.

    prediction: class indices (D, H, W); affine: (4, 4), voxel index to mm.
    """
    counts = np.bincount(prediction.ravel(), minlength=len(class_names) + 1)[1:]
    millilitres = np.nan if affine is None else abs(np.linalg.det(affine[:3, :3])) / 1000
    return [(name, c, int(n), float(n * millilitres)) for c, n in zip(class_names, counts, strict=True)]


def write_volumes_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the rows of `organ_volumes` as CSV; unknown millilitres are an empty cell."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["scan", "class", "voxels", "millilitres"])
        writer.writerows((scan, c, n, "" if np.isnan(ml) else f"{ml:.3f}") for scan, c, n, ml in rows)


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
