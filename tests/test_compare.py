"""compare.py as a user runs it: tested run folders to tables, figures and a page, one line for whatever is wrong."""

import html
import re

import pandas as pd

from tests.comparison_runs import random_dice, write_run
from tests.conftest import ROOT
from tests.test_scripts import assert_one_line

OLD = ROOT / "tests" / "fixtures" / "comparison_2c5fbf2"
"""Four run folders and what compare.py of revision 2c5fbf2 wrote for them."""
HOSTILE = "<script>alert(1)</script> & co"


def test_the_figures_are_those_of_an_earlier_revision(run_script, tmp_path):
    runs = [OLD / "runs" / name for name in ("ours_1", "ours_2", "no_dsgim", "unet")]
    assert run_script("compare.py", *runs, "--output_dir", tmp_path).status == 0
    for name, sorted_by in (
        ("comparison.csv", ["source", "method", "convention", "class", "metric"]),
        ("paired_tests.csv", ["convention", "metric", "first", "second"]),
    ):
        old, new = (pd.read_csv(folder / name).sort_values(sorted_by, ignore_index=True) for folder in (OLD, tmp_path))
        pd.testing.assert_frame_equal(new, old[new.columns], rtol=1e-5, check_dtype=False)


def test_from_tested_runs_to_tables_figures_and_the_page(run_script, tmp_path):
    out = tmp_path / "runs" / "comparison"
    out.mkdir(parents=True)
    ours = [
        write_run(tmp_path / name, random_dice(8, seed), seed=seed, decoder_feature_dim=width)
        for name, seed, width in (("a1", 1, 16), ("a2", 2, 16), ("b1", 1, 8))
    ]
    other = write_run(tmp_path / "other", random_dice(3, 0), network="unet", volume_path="data/other/test_vol_h5")
    runs = f"{HOSTILE}={ours[0]}", f"{HOSTILE}={ours[1]}", ours[2], other, out, tmp_path
    done = run_script("compare.py", *runs, "--output_dir", out, "--no_published")
    assert done.status == 0 and done.error.count("warning") == 1, done.error
    assert f"left out: {tmp_path} is not a run folder" in done.error
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = ["1_acdc_test_boxes", "2_acdc_test_boxes", "acdc_training", "acdc_in_other_test_vol_h5_training"]
    tables = {"comparison.csv", "paired_tests.csv", "comparison.md", "comparison.tex", "comparison.html"}
    assert names == tables | {f"figures/{name}.png" for name in pictures}

    page = (out / "comparison.html").read_text("utf-8")
    assert "<script" not in page and page.count("<img") == 4 and html.escape(HOSTILE) in page
    links = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", page)
    assert all(link.startswith(("data:", "#")) for link in links)  # nothing from elsewhere
    texts = [done.output, *((out / name).read_text("utf-8") for name in ("comparison.md", "comparison.tex"))]
    assert all("myocardium" in text and "published" not in text for text in texts)
    assert re.search(r"\| decoder_feature_dim +\| +16 \| +8 \|", texts[1])


def test_a_run_chosen_on_the_test_cases_is_marked_and_needs_no_history_and_no_data(run_script, tmp_path):
    run = write_run(tmp_path / "a", random_dice(8, 0), volume_path="nowhere", selected_on="test")
    (run / "metrics.csv").unlink()
    out = tmp_path / "out"
    done = run_script("compare.py", run, "--output_dir", out)
    assert done.status == 0 and "warning" not in done.error
    text = (out / "comparison.md").read_text("utf-8")
    assert re.search(r"\| sim_mpnet \* \| +1 \| +8 \|", text) and "optimistic" in text
    assert [path.name for path in out.glob("figures/*")] == ["1_acdc_test_boxes.png"]


def test_the_tested_checkpoint_is_named_and_results_before_a_better_epoch_warn(run_script, tmp_path):
    for name, seed, file, epoch in (("old", 1, "best.pth", 2), ("last", 2, "last.pth", 5), ("new", 3, "best.pth", 6)):
        tested = {"file": file, "epoch": epoch, "prediction": "sum" if seed == 3 else None}
        write_run(tmp_path / name, random_dice(3, 0), seed=seed, summary={"checkpoint": tested})  # its best epoch is 6
    runs = [tmp_path / name for name in ("old", "last", "new")]
    done = run_script("compare.py", *runs, "--output_dir", tmp_path / "out").succeeded()
    assert "old: its results are of epoch 2, but best.pth now holds" in done.error
    assert "last: its results are of epoch 5, but last.pth" in done.error and done.error.count("warning") == 2
    page = (tmp_path / "out" / "comparison.md").read_text("utf-8")
    assert all(text in page for text in ("best.pth, epoch 2", "last.pth, epoch 5", "best.pth, epoch 6, prediction sum"))


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


def test_what_is_wrong_is_one_line(run_script, tmp_path):
    run, out = write_run(tmp_path / "run", random_dice(3, 0)), ["--output_dir", tmp_path / "out"]
    assert_one_line(run_script("compare.py", "nowhere", *out), "nowhere is not a run folder", "config.json")
    assert_one_line(run_script("compare.py", run, "--split", "val", *out), "--split val")
    assert not (tmp_path / "out").exists()
