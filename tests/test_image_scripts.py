"""The two colour data sets as a user runs them: from raw images to tables, masks and overlays."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.conftest import SMALL, run_in_process
from tests.datasets.test_isic import write_raw as write_isic
from tests.datasets.test_segpc import write_raw as write_segpc
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.test_scripts import assert_one_line

TINY = [*SMALL, *"--img_size 32 --img_size_dmwla 32 --max_iterations 2 --warmup_iterations 1 --batch_size 2".split()]


def write_cells(folder: Path) -> None:
    write_segpc(folder / "train", ("3", "5", "8", "9", "10"))
    write_segpc(folder / "valid", ("20", "21"))


def cases(results: Path) -> set[str]:
    return set(pd.read_csv(results / "cases.csv", dtype=str)["case"])


def where(folder: Path) -> list:
    return ["--root_path", folder / "data", "--list_dir", folder / "data/lists"]


@pytest.fixture(scope="module", params=["segpc", "isic"])
def made(request, tmp_path_factory) -> tuple[str, Path]:
    """A data set and its folder, with raw and prepared images and a run."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "segpc":
        write_cells(folder / "raw")
    else:
        write_isic(folder / "raw", [f"ISIC_{number:07d}" for number in range(10)])
    flags = ["--raw", folder / "raw", "--out", folder / "data", "--jobs", 1]
    done = run_in_process("prepare_data.py", request.param, *flags)
    assert done.status == 0, done.error
    assert f"train_{request.param}.py --root_path" in done.error
    flags = [*where(folder), *TINY, "--output_dir", folder / "run", "--photometric"]
    done = run_in_process(f"train_{request.param}.py", *flags)
    assert done.status == 0, done.error
    return request.param, folder


def test_from_raw_images_to_tables_masks_and_overlays(made, run_script):
    dataset, folder = made
    state = torch.load(folder / "run/best.pth", weights_only=True)
    assert state["network"]["in_channels"] == 3
    assert state["data"]["preprocessing"] == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    flags = ["--save_masks", "--overlays", 1, "--checkpoint", folder / "run/best.pth"]
    done = run_script(f"test_{dataset}.py", *where(folder), *flags)
    assert done.status == 0, done.error
    for words in ("HD95 [pixels]", "Jaccard, 0 below 0.65 [%]", "over the pixels of all cases together"):
        assert words in done.output
    results = folder / "run" / "results_test"
    names = (folder / "data/lists/test.txt").read_text().split()
    for kind in ("masks", "overlays"):
        assert {path.stem for path in (results / kind).iterdir()} == set(names)
    assert json.loads((results / "summary.json").read_text())["num_cases"] == len(names)
    assert cases(results) == set(names)

    mask = np.asarray(Image.open(results / "masks" / f"{names[0]}.png"))
    image = next((folder / "data/images").glob(f"{names[0]}.*"))
    flags = ["--checkpoint", folder / "run/best.pth", "--device", "cpu", "--overlays", 1]
    out = folder / "out" / "mask.png"
    done = run_script("predict.py", *flags, "--input", image, "--output", out)
    assert done.status == 0, done.error
    np.testing.assert_array_equal(np.asarray(Image.open(out)), mask)
    with Image.open(folder / "out/mask_overlays/mask.png") as overlay, Image.open(image) as own:
        assert overlay.size == own.size
    areas = pd.read_csv(folder / "out/mask_areas.csv")["pixels"].tolist()
    assert areas == [(mask == c).sum() for c in range(1, len(areas) + 1)]

    done = run_script("predict.py", *flags, "--input", folder / "data/images", "--output", folder / "many")
    assert done.status == 0, done.error
    assert len(list((folder / "many").glob("*.png"))) == len(list((folder / "data/images").iterdir()))


@pytest.mark.parametrize("made", ["segpc"], indirect=True)
def test_single_cells_are_tested_on_by_the_lists_of_their_images(made, tmp_path, run_script):
    _, folder = made
    flags = ["--raw", folder / "raw", "--out", tmp_path / "data", "--jobs", 1]
    done = run_script("prepare_data.py", "segpc", "--crops", *flags)
    assert done.status == 0, done.error
    flags = ["--checkpoint", folder / "run/best.pth", "--test_save_dir", tmp_path / "results", "--device", "cpu"]
    done = run_script("test_segpc.py", *where(tmp_path), *flags)
    assert done.status == 0, done.error
    images = set((folder / "data/lists/test.txt").read_text().split())
    assert images == set((tmp_path / "data/lists/test.txt").read_text().split())
    cells = {path.stem for path in (tmp_path / "data/masks").glob("*.png") if path.stem.split("_cell")[0] in images}
    assert cases(tmp_path / "results") == cells and len(cells) > len(images)
    assert "best.pth was trained on whole images, but these are single cells" in done.error


def test_what_is_wrong_is_one_line(tmp_path, run_script):
    write_cells(tmp_path / "raw")
    run_script("prepare_data.py", "segpc", "--raw", tmp_path / "raw", "--out", tmp_path / "data", "--jobs", 1)
    flags = [*where(tmp_path), *TINY, "--output_dir", tmp_path / "run"]
    name = (tmp_path / "data/lists/train.txt").read_text().split()[0]
    (tmp_path / "data/lists/val.txt").write_text(f"{name}\n")
    done = run_script("train_segpc.py", *flags)
    assert_one_line(done, "val.txt", f"{name} is also in train.txt")
    mask = tmp_path / "data/masks" / f"{name}.png"
    mask.write_bytes(mask.read_bytes()[:40])
    done = run_script("train_segpc.py", *flags, "--val_split", "test")
    assert_one_line(done, mask)
    done = run_script("train_isic.py", *TINY, "--root_path", tmp_path / "nowhere")
    assert_one_line(done, "nowhere", "prepare_data.py isic")
    assert not (tmp_path / "run").exists()
