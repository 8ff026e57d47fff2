"""compare.py as a user runs it: tested run folders to tables, figures and a page, one line for whatever is wrong."""

import csv
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from datasets import acdc
from datasets.phantom import write_phantom
from networks import SimMPNet
from networks.complexity import count_parameters
from tests.comparison_runs import random_dice, write_run
from tests.conftest import ROOT
from tests.test_scripts import assert_one_line
from tests.utils.test_html_page import Reader
from utils.checkpoint import save_checkpoint

OLD = ROOT / "tests" / "fixtures" / "comparison_2c5fbf2"
"""Four run folders and what compare.py of revision 2c5fbf2 wrote for them."""
SMALL = dict(model_scale="pico", img_size=64, img_size_dmwla=64, feature_dim=16, decoder_feature_dim=16)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, (1, 1, 2))
    return folder


@pytest.fixture(scope="module")
def trained(phantom, tmp_path_factory) -> list[Path]:
    """Run folders of two seeds of one method and one of another, untrained, as no test looks at what they predict."""
    root, folders = tmp_path_factory.mktemp("runs"), []
    where = {"volume_path": f"{phantom}/test_vol_h5", "list_dir": f"{phantom}/lists"}
    data = {"dataset": "acdc", "class_names": acdc.CLASS_NAMES, "preprocessing": acdc.INFO.preprocessing.to_dict()}
    for name, seed, width in (("a1", 1, 16), ("a2", 2, 16), ("b1", 1, 8)):
        torch.manual_seed(seed)
        model = SimMPNet(num_classes=4, **SMALL | {"decoder_feature_dim": width})
        folders.append(write_run(root / name, {}, seed=seed, decoder_feature_dim=width, **where))
        state = {"model": model.state_dict(), "network": model.config, "data": {**data, "selected_on": "val"}}
        save_checkpoint(folders[-1] / "best.pth", state)
    return folders


@pytest.fixture
def runs(trained, tmp_path) -> list[Path]:
    """Copies that a test may damage."""
    return [Path(shutil.copytree(folder, tmp_path / "runs" / folder.name)) for folder in trained]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_an_earlier_revision(run_script, tmp_path):
    runs = [OLD / "runs" / name for name in ("ours_1", "ours_2", "no_dsgim", "unet")]
    assert run_script("compare.py", *runs, "--num_cases", 0, "--output_dir", tmp_path).status == 0
    keys = {
        "comparison.csv": ["source", "method", "convention", "class", "metric"],
        "paired_tests.csv": ["convention", "metric", "first", "second"],
    }
    for name, sorted_by in keys.items():
        old, new = (pd.read_csv(folder / name).sort_values(sorted_by, ignore_index=True) for folder in (OLD, tmp_path))
        pd.testing.assert_frame_equal(new, old[new.columns], rtol=1e-5, check_dtype=False)
    old, new = (measured_rows(folder / "comparison.md") for folder in (OLD, tmp_path))
    assert new == old and len(old) == 30


def measured_rows(path: Path) -> list[list[float]]:
    """Return the numbers in each row about a method of our own, without the names of run folders."""
    lines = [line for line in path.read_text("utf-8").splitlines() if re.match(r"\| *(sim_mpnet|unet) ?[^|]*\|", line)]
    return sorted([float(n) for n in re.findall(r"[-+]?\d+\.?\d*", line)] for line in lines if "runs/" not in line)


def test_from_tested_runs_to_tables_figures_and_the_page(runs, phantom, run_script, tmp_path):
    for run in runs:
        flags = ["--volume_path", phantom / "test_vol_h5", "--list_dir", phantom / "lists"]
        assert run_script("test_acdc.py", "--checkpoint", run / "best.pth", *flags).status == 0
    out = tmp_path / "runs" / "comparison"
    out.mkdir()
    named = [f"Ours & <co>={runs[0]}", runs[1], runs[2], out]
    done = run_script("compare.py", *named, "--output_dir", out, "--measure", "--batch_size", 2)
    assert done.status == 0 and "warning" not in done.error, done.error
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {"1_acdc_test_boxes.png", "1_acdc_test_predictions.png", "acdc_training.png"}
    tables = {"comparison.csv", "paired_tests.csv", "comparison.md", "comparison.tex", "comparison.html"}
    assert names == tables | {f"figures/{name}" for name in pictures}

    ours = [row for row in rows(out / "comparison.csv") if row["method"] == "Ours & <co>"]
    assert {(row["seeds"], row["source"]) for row in ours} == {("2", "measured")}
    for convention in ("transunet", "strict"):
        for metric in ("dice", "hd95", "jaccard", "assd"):
            (row,) = (r for r in ours if (r["convention"], r["class"], r["metric"]) == (convention, "mean", metric))
            summaries = [json.loads((run / "results_test/summary.json").read_text("utf-8")) for run in runs[:2]]
            means = [summary[convention]["mean"][metric] for summary in summaries]
            scale = 100 if row["unit"] == "%" else 1
            assert float(row["mean"]) == pytest.approx(scale * sum(means) / 2, rel=1e-4)
    assert float(ours[0]["images_per_second"]) > 0 and float(ours[0]["peak_memory_bytes"]) > 0
    model = SimMPNet(num_classes=4, **SMALL)
    assert int(ours[0]["parameters"]) == count_parameters(model)
    assert int(ours[0]["flops"]) == 2 * int(ours[0]["multiply_adds"]) > 1e7
    assert {row["source"] for row in rows(out / "comparison.csv")} == {"measured"}  # of other lists than ACDC's
    tested = rows(out / "paired_tests.csv")
    assert {(row["first"], row["second"]) for row in tested} == {("Ours & <co>", "sim_mpnet, decoder_feature_dim 8")}

    page = Reader((out / "comparison.html").read_text("utf-8"))
    assert not page.open and not page.wrong and page.tags["img"] == 3
    assert "Ours & <co>" in "".join(page.text)
    assert "images/s" in done.output and "myocardium" in done.output and "published" not in done.output
    for text in (
        (out / "comparison.md").read_text("utf-8"),
        (out / "comparison.tex").read_text("utf-8"),
    ):
        assert "images/s" in text and "published" not in text and "myocardium" in text
    text = (out / "comparison.md").read_text("utf-8")
    assert all(f"| {run} |\n" in text for run in runs)
    assert "| decoder_feature_dim | 16 | 8 |\n" in text
    with Image.open(out / "figures/1_acdc_test_predictions.png") as figure:
        assert figure.width > figure.height  # image, label and two methods beside one another


def test_without_data_or_checkpoints_the_tables_are_made_and_what_is_missing_is_said(run_script, tmp_path):
    first = write_run(tmp_path / "a", random_dice(8, 0), volume_path="nowhere", selected_on="test")
    second = write_run(tmp_path / "b", random_dice(8, 1), network="unet", volume_path="nowhere")
    out = tmp_path / "out"
    done = run_script("compare.py", first, second, "--output_dir", out, "--no_published")
    assert done.status == 0
    assert done.error.count("warning:") == 2 and done.error.count("no checkpoint at") == 2
    text = (out / "comparison.md").read_text("utf-8")
    assert "| sim_mpnet \\* | 1 | 8 | - | - |" in text and "optimistic" in text
    assert "published" not in text
    assert not list(out.rglob("*predictions.png")) and (out / "figures/acdc_training.png").is_file()


def test_published_rows_stand_once_per_data_set_beside_its_test_split(run_script, tmp_path):
    run = write_run(tmp_path / "a", random_dice(3, 0), split="test")
    for split in ("another", "val"):
        write_run(tmp_path / "a", random_dice(3, 0), split=split)
    other = write_run(tmp_path / "b", random_dice(3, 0, num_classes=2), split="val", dataset="segpc", class_names="xy")
    for split, heading in (([], "acdc, test"), (["--split", "another", "val"], "acdc, val")):
        done = run_script("compare.py", run, other, "--output_dir", tmp_path / "out", *split)
        assert done.status == 0
        parts = (tmp_path / "out/comparison.md").read_text("utf-8").split("\n## ")
        published = {part.splitlines()[0]: part.count("| *U-Net (published)*") for part in parts}
        assert {name: count for name, count in published.items() if count} == {heading: 2, "segpc, val": 2}
        assert "published" not in done.output
        assert "U-Net (published)" in (tmp_path / "out/comparison.tex").read_text("utf-8")
        assert "U-Net" in "".join(Reader((tmp_path / "out/comparison.html").read_text("utf-8")).text)
        sources = {(row["method"], row["source"]) for row in rows(tmp_path / "out/comparison.csv")}
        assert len({method for method, source in sources if source == "published"}) == 18


def test_a_run_that_was_not_tested_changes_no_name(run_script, tmp_path):
    run = write_run(tmp_path / "a", random_dice(3, 0))
    other = write_run(tmp_path / "b", {}, base_lr=1e-3)
    done = run_script("compare.py", run, other, "--output_dir", tmp_path / "out")
    assert done.status == 0 and "was not tested" in done.error
    assert {row["method"] for row in rows(tmp_path / "out/comparison.csv") if row["source"] == "measured"} == {
        "sim_mpnet"
    }


def test_where_the_volumes_are_not_at_hand_the_figure_is_left_out_with_a_line(runs, run_script, tmp_path):
    run = write_run(runs[0], random_dice(3, 0), volume_path=str(tmp_path / "nowhere"))
    done = run_script("compare.py", run, "--output_dir", tmp_path / "out")
    assert done.status == 0
    (line,) = [line for line in done.error.splitlines() if line.startswith("warning:")]
    assert "no figure of predictions of acdc, test" in line and "nowhere" in line
    done = run_script("compare.py", run, "--output_dir", tmp_path / "out", "--num_cases", 0)
    assert done.status == 0 and "warning:" not in done.error


def test_what_is_no_run_folder_is_left_out_with_a_line(run_script, tmp_path):
    run = write_run(tmp_path / "a", random_dice(3, 0))
    (tmp_path / "lists").mkdir()
    done = run_script("compare.py", tmp_path / "lists", run, "--output_dir", tmp_path / "out", "--num_cases", 0)
    assert done.status == 0
    assert f"warning: left out: {tmp_path}/lists is no run folder" in done.error


def test_an_untested_run_is_one_line_with_the_command_that_tests_it(run_script, tmp_path):
    run = write_run(tmp_path / "a", {})
    done = run_script("compare.py", run, "--output_dir", tmp_path / "out")
    assert_one_line(done, f"python test_acdc.py --checkpoint {run}/best.pth")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], ["no run folder", "nowhere"]),
        (["=RUN"], ["NAME=FOLDER"]),
        (["RUN", "--cases", "patient999"], ["patient999", "patient000"]),
        (["RUN", "--split", "val"], ["--split val"]),
        (["RUN", "--batch_size", "0"], ["--batch_size"]),
        (["RUN", "ISIC", "--volume_path", "x"], ["--volume_path", "one at a time"]),
        (["RUN", "--device", "abacus"], ["abacus"]),
        ([], ["runs"]),
    ],
)
def test_bad_flags_are_one_line(run_script, tmp_path, flags, words):
    write_run(tmp_path / "RUN", random_dice(3, 0))
    write_run(tmp_path / "ISIC", random_dice(3, 0, num_classes=1), class_names=["lesion"], dataset="isic")
    flags = [flag.replace("RUN", f"{tmp_path}/RUN").replace("ISIC", f"{tmp_path}/ISIC") for flag in flags]
    done = run_script("compare.py", *flags, "--output_dir", tmp_path / "out")
    assert_one_line(done, *words)
