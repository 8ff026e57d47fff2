"""Every data set as a user runs it: from raw files, by the commands of docs/reproduce.md as they stand, to one table.

Only where the data are, what else is to be written and a budget of two steps are added to the commands.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, SMALL, Outcome, data_flags, run_in_process, write_lists
from tests.datasets.test_isic import write_raw as write_isic
from tests.datasets.test_segpc import write_raw as write_segpc
from tests.datasets.test_synapse import write_other
from tests.datasets.test_synapse import write_raw as write_synapse
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.test_docs import commands
from tests.test_scripts import assert_one_line

TINY = [*SMALL, *"--max_iterations 2 --warmup_iterations 1 --batch_size 2".split()]
IMAGES = ("segpc", "isic")
ADDED = {
    "test_synapse": ["--is_savenii"],
    **{f"train_{name}": ["--photometric"] for name in IMAGES},
    **{f"test_{name}": ["--save_masks", "--overlays", 1] for name in IMAGES},
}


def where(script: str, data: Path) -> list[str]:
    """Return the flags that tell a script where a data set is."""
    if script.endswith(IMAGES):
        return ["--root_path", f"{data}", "--list_dir", f"{data}/lists"]
    return data_flags(data)[0 if script.startswith("train") else 2 :]


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom) -> dict[str, Path]:
    """Prepare tiny data sets from raw files in ``raw``, beside them; of Synapse 5 and 7 train, and 1 tests."""
    folder = tmp_path_factory.mktemp("data")
    write_synapse(folder / "raw/synapse", cases=(1, 5, 7))
    write_segpc(folder / "raw/segpc/train", ("3", "5", "8", "9", "10"))
    write_segpc(folder / "raw/segpc/valid", ("20", "21"))
    write_isic(folder / "raw/isic", [f"ISIC_{number:07d}" for number in range(10)])
    for name in ("synapse", *IMAGES):
        flags = ["--raw", folder / "raw" / name, "--out", folder / name, "--jobs", 1]
        assert f"train_{name}.py --root_path" in run_in_process("prepare_data.py", name, *flags).succeeded().error
    write_lists(folder / "synapse/lists", train=["case0005", "case0007"], test_vol=["case0001"])
    return {"acdc": phantom} | {name: folder / name for name in ("synapse", *IMAGES)}


@pytest.fixture(scope="module")
def rows(data, tmp_path_factory) -> tuple[Path, dict[str, list[Outcome]]]:
    """Run every row; return the folder of the runs, and by row what training and testing printed."""
    folder, printed = tmp_path_factory.mktemp("runs"), {}
    for script, flags in commands((ROOT / "docs/reproduce.md").read_text(encoding="utf-8")):
        if script.parent != ROOT or script.stem == "compare":
            continue
        flags = [flag.replace("runs/reproduce/", f"{folder}/") for flag in flags]
        flags += [*where(script.stem, data[script.stem.split("_")[1]]), *ADDED.get(script.stem, [])]
        if script.stem.startswith("train"):
            run = Path(flags[flags.index("--output_dir") + 1])
            held_out = ["--val_cases", "case0007"] if run.name == "synapse" else []
            flags += [*TINY, "--select_from_epoch", "1", *held_out]
        done = run_in_process(script.name, *flags)
        assert done.status == 0, f"{script.name} {flags}: {done.error}"
        printed.setdefault(run.name, []).append(done)
    return folder, printed


def test_every_row_is_trained_and_tested_and_all_are_in_one_table(rows, run_script, tmp_path):
    folder, printed = rows
    assert [len(outcomes) for outcomes in printed.values()] == [2] * 10
    assert len(list(folder.glob("*/results_*/summary.json"))) == 10
    run_script("compare.py", *sorted(folder.iterdir()), "--output_dir", tmp_path).succeeded()
    assert set(pd.read_csv(tmp_path / "comparison.csv")["dataset"].str.split().str[0]) >= {"synapse", *IMAGES}


@pytest.mark.parametrize(("row", "select", "slices"), [("synapse", "val", 10), ("synapse_by_test", "test", 20)])
def test_training_and_testing_say_what_the_best_epoch_was_chosen_on(rows, row, select, slices):
    run, (trained, tested) = rows[0] / row, rows[1][row]
    assert f"{slices} training samples, 1 validation case," in trained.error
    assert ("chosen on the test cases" in trained.error) == (select == "test")
    assert ("Dice on the test volumes" in (run / "train.log").read_text()) == (select == "test")
    assert f",{select}," in (run / "metrics.csv").read_text()
    facts = torch.load(run / "best.pth", weights_only=True)["data"]
    assert (facts["selected_on"], facts["class_names"][4]) == (select, "liver")
    assert facts["preprocessing"] == {"orientation": "LAS", "window": (-125.0, 275.0)}
    assert ("chosen on the test volumes" in tested.output) == (select == "test")
    assert "HD95 [mm]" in tested.output and "left kidney" in tested.output
    results = run / "results_test_vol"
    assert json.loads((results / "summary.json").read_text())["selected_on"] == select
    assert list(pd.read_csv(results / "cases.csv")["selected_on"]) == [select] * 8
    assert (results / "nifti/case0001_pred.nii.gz").is_file()


@pytest.mark.parametrize("name", IMAGES)
def test_images_get_tables_masks_and_overlays(data, rows, tmp_path, run_script, name):
    run, (_, tested) = rows[0] / name, rows[1][name]
    state = torch.load(run / "best.pth", weights_only=True)
    assert state["network"]["in_channels"] == 3
    assert state["data"]["preprocessing"] == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for words in ("HD95 [pixels]", "Jaccard, 0 below 0.65 [%]", "over the pixels of all cases together"):
        assert words in tested.output
    cases = (data[name] / "lists/test.txt").read_text().split()
    for kind in ("masks", "overlays"):
        assert sorted(path.stem for path in (run / "results_test" / kind).iterdir()) == sorted(cases)
    assert set(pd.read_csv(run / "results_test/cases.csv", dtype=str)["case"]) == set(cases)

    mask = np.asarray(Image.open(run / "results_test/masks" / f"{cases[0]}.png"))
    image = next((data[name] / "images").glob(f"{cases[0]}.*"))
    flags = ["--checkpoint", run / "best.pth", "--device", "cpu", "--overlays", 1]
    run_script("predict.py", *flags, "--input", image, "--output", tmp_path / "one/mask.png").succeeded()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one/mask.png")), mask)
    with Image.open(tmp_path / "one/mask_overlays/mask.png") as overlay, Image.open(image) as own:
        assert overlay.size == own.size
    areas = pd.read_csv(tmp_path / "one/mask_areas.csv")["pixels"].tolist()
    assert areas == [(mask == c).sum() for c in range(1, len(areas) + 1)]
    run_script("predict.py", *flags, "--input", image.parent, "--output", tmp_path / "many").succeeded()
    assert len(list((tmp_path / "many").glob("*.png"))) == len(list(image.parent.iterdir()))


def test_single_cells_are_tested_on_by_the_lists_of_their_images(data, rows, tmp_path, run_script):
    flags = ["--raw", data["segpc"].parent / "raw/segpc", "--out", tmp_path / "data", "--jobs", 1]
    run_script("prepare_data.py", "segpc", "--crops", *flags).succeeded()
    flags = ["--checkpoint", rows[0] / "segpc/best.pth", "--test_save_dir", tmp_path / "results"]
    done = run_script("test_segpc.py", *where("test_segpc", tmp_path / "data"), *flags).succeeded()
    images, same = ({*(x / "lists/test.txt").read_text().split()} for x in (data["segpc"], tmp_path / "data"))
    cells = {path.stem for path in (tmp_path / "data/masks").glob("*.png") if path.stem.split("_cell")[0] in images}
    assert images == same and len(cells) > len(images)
    assert set(pd.read_csv(tmp_path / "results/cases.csv", dtype=str)["case"]) == cells
    assert "best.pth was trained on whole images, but these are single cells" in done.error


def test_other_files_need_their_label_order(data, rows, run_script, tmp_path):
    theirs = write_other(tmp_path / "theirs", "transunet")
    run = rows[0] / "synapse_by_test"
    flags = ["--checkpoint", run / "best.pth", "--test_save_dir", tmp_path / "results", *data_flags(theirs)[2:]]
    done = run_script("test_synapse.py", *flags)
    assert done.status == 0 and "--label_order" in done.error and "warning" in done.error
    assert "--label_order" not in run_script("test_synapse.py", *flags, "--label_order", "transunet").succeeded().error
    state = torch.load(run / "best.pth", weights_only=True)
    state["args"] |= {"volume_path": flags[5], "list_dir": flags[7], "label_order": "transunet"}
    torch.save(state, tmp_path / "theirs.pth")
    for more in ((), ("--volume_path", os.path.relpath(flags[5], ROOT))):  # the same folder by another path
        done = run_script("test_synapse.py", "--checkpoint", tmp_path / "theirs.pth", *flags[2:4], *more)
        assert done.status == 0 and "--label_order" not in done.error  # that of the training
    more = data_flags(data["synapse"])[2:4]
    done = run_script("test_synapse.py", "--checkpoint", tmp_path / "theirs.pth", *flags[2:4], *more)
    assert_one_line(done, "the training had --label_order transunet")
    flags = ["--resume", run / "last.pth", "--label_order", "transunet"]
    assert_one_line(run_script("train_synapse.py", *flags), "--label_order transunet")


def test_weights_chosen_on_test_cases_stay_so_in_new_runs_and_wrong_data_are_one_line(data, rows, run_script, tmp_path):
    flags = [*data_flags(data["synapse"]), *TINY, "--output_dir", tmp_path, "--val_cases"]
    done = run_script("train_synapse.py", *flags, "case0001")
    assert_one_line(done, "train.txt", "case0001", "case0007", "--val_cases")
    flags += ["case0007", "--init_from", rows[0] / "synapse_by_test/best.pth"]
    done = run_script("train_synapse.py", *flags).succeeded()
    assert "this run starts from were chosen on the test cases" in done.error
    assert torch.load(tmp_path / "last.pth", weights_only=True)["data"]["selected_on"] == "test"
    done = run_script("test_synapse.py", "--checkpoint", rows[0] / "acdc/best.pth", *data_flags(data["synapse"])[2:])
    assert_one_line(done, "best.pth", "test_acdc.py")
