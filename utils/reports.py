"""What accompanies a segmentation: the colours and names of its labels, and how large each organ is."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.figures import class_rgb
from utils.files import atomic_write

Row = tuple[str, str, int, float]
"""Scan or image, class, voxels or pixels, and what these are: millilitres, or the share of the image."""


def write_colour_tables(stem: str | Path, class_names: Sequence[str]) -> list[Path]:
    """Write names and colours of the label ids as `<stem>labels.ctbl` for 3D Slicer, `<stem>labels_itksnap.txt`.

    Colours are those of the overlays; background (0) is transparent. Gives the paths.
    Source: the colour table format of Slicer's user guide, the label description format of ITK-SNAP's.
    """
    entries = [(0, "background", (0, 0, 0))]
    entries += [(c, name, class_rgb(c)) for c, name in enumerate(class_names, 1)]
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
    millilitres = np.nan if affine is None else abs(np.linalg.det(affine[:3, :3])) / 1000
    return [(name, c, n, n * millilitres) for c, n in _counts(prediction, class_names)]


def picture_areas(name: str, prediction: np.ndarray, class_names: Sequence[str]) -> list[Row]:
    """Give (image, class, pixels, share of the image) for every class but the background.

    prediction: class indices (H, W).
    """
    return [(name, c, n, n / prediction.size) for c, n in _counts(prediction, class_names)]


def write_report(path: str | Path, header: Sequence[str], rows: Iterable[Row]) -> None:
    """Write the rows of `organ_volumes` or `picture_areas` as CSV; NaN is an empty cell."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows((name, c, n, "" if np.isnan(x) else f"{x:.6f}") for name, c, n, x in rows)


def _counts(prediction: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, int]]:
    # Plane by plane, since bincount makes 8 bytes of every voxel.
    counts = sum(np.bincount(plane.ravel(), minlength=len(class_names) + 1) for plane in prediction)[1:]
    return list(zip(class_names, counts.tolist(), strict=True))
