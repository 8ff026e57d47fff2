"""compare.py as a user runs it: tested run folders to tables, figures and a page, one line for whatever is wrong."""

import html
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from datasets import VolumeDataset
from networks import SimMPNet
from networks.complexity import count_multiply_adds, count_parameters
from tests.comparison_runs import random_dice, save_network, write_run
from tests.conftest import ROOT
from tests.narrow import use_narrow_pico
from tests.test_scripts import assert_one_line

OLD = ROOT / "tests" / "fixtures" / "comparison_2c5fbf2"
"""Four run folders and what compare.py of revision 2c5fbf2 wrote for them."""
SMALL = dict(model_scale="pico", img_size=64, img_size_dmwla=64, feature_dim=16, decoder_feature_dim=16)
HOSTILE = "<script>alert(1)</script> & co"


@pytest.fixture
def trained(phantom, tmp_path, monkeypatch) -> list[Path]:
    """Run folders of two seeds of one method and one of another, with random weights and results."""
    names = VolumeDataset(phantom / "test_vol_h5", phantom / "lists", "test", 4).names
    use_narrow_pico(monkeypatch)
    root, folders = tmp_path / "runs", []
    where = {"volume_path": f"{phantom}/test_vol_h5", "list_dir": f"{phantom}/lists"}
    for name, seed, width in (("a1", 1, 16), ("a2", 2, 16), ("b1", 1, 8)):
        torch.manual_seed(seed)
        model = SimMPNet(num_classes=4, **SMALL | {"decoder_feature_dim": width})
        dice = dict(zip(names, random_dice(len(names), seed).values(), strict=True))
        folders.append(write_run(root / name, dice, seed=seed, decoder_feature_dim=width, **where))
        save_network(folders[-1] / "best.pth", model)
    return folders


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


def test_from_tested_runs_to_tables_figures_and_the_page(trained, run_script, tmp_path):
    out = tmp_path / "runs" / "comparison"
    out.mkdir()
    other = write_run(tmp_path / "other", random_dice(3, 0), network="unet", volume_path="data/other/test_vol_h5")
    runs = f"{HOSTILE}={trained[0]}", f"{HOSTILE}={trained[1]}", trained[2], other, out
    done = run_script("compare.py", *runs, "--output_dir", out, "--num_cases", 1)
    assert done.status == 0 and done.error.count("warning") == 1, done.error
    assert "unet: its size and its predictions are left out: no checkpoint at" in done.error
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    ours, others = "acdc_in_phantom0_test_vol_h5", "acdc_in_other_test_vol_h5"
    pictures = ["1_acdc_test_boxes", "1_acdc_test_patient004_frame01", "2_acdc_test_boxes", f"{ours}_training"]
    tables = {"comparison.csv", "paired_tests.csv", "comparison.md", "comparison.tex", "comparison.html"}
    assert names == tables | {f"figures/{name}.png" for name in [*pictures, f"{others}_training"]}

    rows = pd.read_csv(out / "comparison.csv")
    assert set(rows["source"]) == {"measured"}  # the lists are not ACDC's own
    assert set(rows["dataset"][rows["method"] == "unet"]) == {"acdc in other/test_vol_h5"}
    ours = rows[rows["method"] == HOSTILE]
    assert set(ours["seeds"]) == {2} and set(ours["dataset"]) == {"acdc in phantom0/test_vol_h5"}
    model = SimMPNet(num_classes=4, **SMALL)
    assert set(ours["parameters"]) == {count_parameters(model)}
    assert set(ours["multiply_adds"]) == {count_multiply_adds(model, 64, 1)}
    tests = pd.read_csv(out / "paired_tests.csv")
    assert set(zip(tests["first"], tests["second"], strict=True)) == {(HOSTILE, "sim_mpnet, decoder_feature_dim 8")}

    page = (out / "comparison.html").read_text("utf-8")
    assert "<script" not in page and page.count("<img") == 5 and html.escape(HOSTILE) in page
    links = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", page)
    assert all(link.startswith(("data:", "#")) for link in links)  # nothing from elsewhere
    texts = [done.output, *((out / name).read_text("utf-8") for name in ("comparison.md", "comparison.tex"))]
    assert all("multiply-adds" in text and "myocardium" in text and "published" not in text for text in texts)
    assert re.search(r"\| decoder_feature_dim +\| +16 \| +8 \|", texts[1])


def test_without_data_or_checkpoints_the_tables_are_written_with_warnings(trained, run_script, tmp_path):
    first = write_run(tmp_path / "a", random_dice(8, 0), volume_path="nowhere", selected_on="test")
    (first / "metrics.csv").unlink()
    (first / "best.pth").symlink_to(trained[0] / "best.pth")
    second = write_run(tmp_path / "b", random_dice(8, 1), network="unet", volume_path="nowhere")
    out = tmp_path / "out"
    done = run_script("compare.py", first, second, tmp_path, "--output_dir", out)
    assert done.status == 0 and done.error.count("warning:") == 3
    assert "no checkpoint at" in done.error and f"left out: {tmp_path} is not a run folder" in done.error
    assert "no figure of predictions of acdc in nowhere, test: nowhere" in done.error
    text = (out / "comparison.md").read_text("utf-8")
    assert re.search(r"\| sim_mpnet \* \| +1 \| +8 \| +\d", text) and "optimistic" in text
    assert {path.name for path in out.glob("figures/*")} == {"1_acdc_test_boxes.png", "acdc_in_nowhere_training.png"}


def test_published_rows_are_beside_the_test_split_with_the_data_sets_own_lists(run_script, tmp_path):
    for split in ("test", "val"):
        run = write_run(tmp_path / "a", random_dice(3, 0), split=split)
    two = random_dice(3, 0, num_classes=2)
    other = write_run(tmp_path / "c", two, dataset="segpc", class_names="xy", list_dir="mine")
    flags = run, other, "--output_dir", tmp_path / "out"
    done = run_script("compare.py", *flags)
    assert done.status == 0 and "published" not in done.output
    parts = (tmp_path / "out/comparison.md").read_text("utf-8").split("\n## ")
    published = {part.splitlines()[0]: part.count("| U-Net (published)") for part in parts}
    assert {name: count for name, count in published.items() if count} == {"acdc, test": 2}
    for name in ("comparison.tex", "comparison.html"):
        assert "U-Net (published)" in (tmp_path / "out" / name).read_text("utf-8")
    rows = pd.read_csv(tmp_path / "out/comparison.csv").query("source == 'published'")
    assert rows.groupby("dataset")["method"].nunique().to_dict() == {"acdc": 18}
    assert run_script("compare.py", *flags, "--no_published").status == 0
    assert "published" not in (tmp_path / "out/comparison.csv").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], ["nowhere is not a run folder", "config.json"]),
        (["nowhere", "elsewhere"], ["elsewhere is not a run folder"]),
        (["UNTESTED"], ["python test_acdc.py --checkpoint", "UNTESTED/best.pth --split test"]),
        (["RUN", "--cases", "patient999"], ["patient999", "patient000"]),
        (["RUN", "--split", "val"], ["--split val"]),
        (["RUN", "--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_flags_are_one_line(run_script, tmp_path, flags, words):
    write_run(tmp_path / "RUN", random_dice(3, 0))
    write_run(tmp_path / "UNTESTED", {})
    flags = [re.sub("RUN|UNTESTED", lambda found: f"{tmp_path}/{found[0]}", flag) for flag in flags]
    done = run_script("compare.py", *flags, "--output_dir", tmp_path / "out")
    assert_one_line(done, *words)
    assert not (tmp_path / "out").exists()
