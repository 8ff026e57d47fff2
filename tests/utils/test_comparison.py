"""Which runs are compared, which are one method, what its scores and their spread are, and what the tests give."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from datasets import DATASETS
from tests.comparison_runs import NAN, class_result, random_dice, write_run
from utils.comparison import MEAN, compare, name_methods, paired_tests
from utils.comparison_report import notes, published_rows
from utils.evaluation import CaseResult
from utils.tested_runs import Run, read_run

CASES = random_dice(3, 0)


def named(*runs) -> list[Run]:
    """Name runs given as folders or (folder, name)."""
    return name_methods([read_run(*run) if isinstance(run, tuple) else read_run(run) for run in runs])


def compared(*runs):
    return compare(named(*runs))


def score(comparison, convention="strict", name=MEAN) -> pd.Series:
    """Return the Dice of a class of the only method."""
    scores = comparison.scores().query("convention == @convention and metric == 'dice' and `class` == @name")
    assert len(scores) == 1
    return scores.iloc[0]


def test_a_method_is_called_by_its_network_and_what_sets_it_apart_and_seeds_are_one(tmp_path):
    flags = [
        ("sim_mpnet", dict(num_workers=0, device="cpu")),  # of a version without --network and --dsgim
        ("sim_mpnet, dsgim none", dict(network="sim_mpnet", dsgim="none")),
        ("unet", dict(network="unet", root_path="/elsewhere/ACDC/train_npz")),
        ("sim_mpnet, base_lr 1e-05, compile", dict(network="sim_mpnet", base_lr=1e-5, compile=True)),
        ("sim_mpnet", dict(network="sim_mpnet", seed=2, device="cuda", list_dir="/elsewhere/lists/lists_ACDC")),
        ("sim_mpnet, list_dir lists/tenth", dict(list_dir="/my/lists/tenth")),
        ("sim_mpnet, variant release", dict(variant="release", select="test", select_from_epoch=100)),
    ]
    runs = named(*(write_run(tmp_path / str(i), random_dice(3, 0), **args) for i, (_, args) in enumerate(flags)))
    assert [run.method for run in runs] == [name for name, _ in flags]
    assert runs[0].settings["dsgim"] == "both" and "dsgim" not in runs[2].settings
    mine = [(run.folder, name) for run, name in zip(runs, ("Ours", "Ours", "U-Net & co"), strict=False)]
    assert [run.method for run in named(*mine)] == ["Ours", "Ours", "U-Net & co"]


def test_what_was_resumed_otherwise_or_tested_otherwise_is_another_method(tmp_path):
    tested = {"checkpoint": {"file": "last.pth", "epoch": 9, "prediction": "last"}, "data": {"list_dir": "my/lists"}}
    runs = [write_run(tmp_path / name, CASES, summary=tested if name == "c" else None) for name in "abc"]
    (runs[1] / "config_resumed.json").write_text(json.dumps({"args": {"ce_weight": 1}}))
    names = ["sim_mpnet", "sim_mpnet, ce_weight 1", "sim_mpnet, prediction last, checkpoint last.pth"]
    assert [run.method for run in named(*runs)] == names
    assert len(published_rows(*compared(runs[0]))) and not len(published_rows(*compared(runs[2])))


def test_a_repeat_of_a_seed_is_left_out_and_unlike_runs_of_one_name_are_pointed_out(tmp_path, caplog):
    runs = [write_run(tmp_path / name, random_dice(3, 0)) for name in "ab"]
    assert [run.folder for run in named(*runs)] == [runs[0]]
    assert f"left out: {runs[1]} repeats" in caplog.text
    assert len(named((runs[0], "Ours"), (write_run(tmp_path / "c", random_dice(3, 0), base_lr=0.5), "Ours"))) == 2
    assert "differ in ['base_lr']" in caplog.text


def test_means_and_spreads_are_those_found_by_hand(tmp_path):
    names = {"class_names": ["lesion"], "dataset": "isic"}
    first = write_run(tmp_path / "a", {"x": [0.8], "y": [0.6]}, seed=1, **names)
    second = write_run(tmp_path / "b", {"x": [0.9], "y": [0.7]}, seed=2, **names)
    spread = math.sqrt(200)
    for runs, expected in (((first, second), [75, spread / 2, spread]), ((first,), [70, NAN, spread])):
        row = score(compared(*runs)[0])
        np.testing.assert_allclose(row[["mean", "sd_over_seeds", "sd_over_cases"]].astype(float), expected)


def test_the_mean_over_classes_leaves_out_what_strict_leaves_out(tmp_path):
    """Of y the second class is absent: strict has no number for it, transunet has 0."""
    results = [
        CaseResult("x", "mm", (class_result(0.8), class_result(0.4))),
        CaseResult("y", "mm", (class_result(0.6), class_result(0.0, strict=NAN))),
    ]
    (comparison,) = compared(write_run(tmp_path / "a", {}, results=results, class_names=["big", "small"]))
    for convention, expected in (("strict", [70, 40, 55]), ("transunet", [70, 20, 45])):
        means = [score(comparison, convention, name)["mean"] for name in ("big", "small", MEAN)]
        np.testing.assert_allclose(means, expected)
    cases = comparison.per_case().query("convention == 'strict' and metric == 'dice' and `class` == @MEAN")
    np.testing.assert_allclose(cases["value"], [60, 60])
    units = comparison.cases.groupby(["convention", "metric"])["unit"].agg(set)
    assert (units["transunet", "hd95"], units["strict", "assd"]) == ({"voxels"}, {"mm"})


def test_a_case_that_is_not_the_same_in_all_runs_is_refused(tmp_path, refused):
    """Its unit, its label and the classes of its label tell; what was predicted does not matter."""
    missed, absent = (
        {"results": [CaseResult(case, "mm", (class_result(1)._replace(state=state),) * 3) for case in CASES]}
        for state in ("missed", "absent")
    )
    labels, changed = ({"summary": {"labels": dict.fromkeys(CASES, label)}} for label in ("4, 1", "4, 2"))
    first = write_run(tmp_path / "a", CASES, **labels)
    compared(first, write_run(tmp_path / "b", {}, **missed, **labels, network="unet"))
    for name, other in (("c", absent), ("d", {"unit": "voxels"}), ("e", changed)):
        second = write_run(tmp_path / name, CASES, **other, network="unet")
        words = f"patient000 has another label or unit in the test of {second} than in that of"
        refused(lambda second=second: compared(first, second), words)


def test_the_tested_checkpoint_says_with_which_arguments_it_was_trained(tmp_path):
    """Not the run, which was continued with others after its best epoch."""
    tested = {"file": "best.pth", "epoch": 6, "args": {"base_lr": 1e-4, "prediction": "last"}}
    run = write_run(tmp_path / "a", CASES, base_lr=1e-4, summary={"checkpoint": tested})
    (run / "config_resumed.json").write_text(json.dumps({"args": {"base_lr": 1e-5}, "ranks": 2}))
    read = read_run(run)
    assert (read.settings["base_lr"], read.settings["ranks"], read.settings["prediction"]) == ("0.0001", "2", "last")
    assert read.tested == "best.pth, epoch 6, prediction last"


def test_folds_of_two_divisions_unequal_seeds_and_unfinished_runs_are_pointed_out(tmp_path, caplog):
    folder = dict(data="data/x", root_path="data/x/train_npz", volume_path="data/x/test_vol_h5")
    runs = []
    for fold, cases, seed in ((0, "ab", 1), (1, "cd", 1), (1, "cd", 2), (2, "bc", 1)):
        dice = {name: [0.5, 0.5, 0.5] for name in cases}
        lists = f"data/x/lists/fold_{fold}"
        runs.append(write_run(tmp_path / str(len(runs)), dice, fold=fold, seed=seed, list_dir=lists, **folder))
        facts = {"channels": ["image"], "preprocessing": DATASETS["acdc"].preprocessing.to_dict()}
        config = json.loads((runs[-1] / "config.json").read_text())
        (runs[-1] / "config.json").write_text(json.dumps(config | {"data": config["data"] | facts}))
    assert set(compared(*runs[:2])[0].scores()["seeds"]) == {1} and not caplog.text
    assert set(compared(*runs[:3])[0].scores()["seeds"]) == {2}
    assert "its folds have 1 to 2 seeds" in caplog.text
    compared(*runs)
    assert "sim_mpnet: b was tested in 2 folds" in caplog.text
    read_run(write_run(tmp_path / "cut", CASES, max_epochs=9))
    assert "its training has done 6 of its 9 epochs" in caplog.text


def test_the_folder_that_was_tested_names_the_data_or_else_that_of_the_training(tmp_path):
    """On any machine; test_compare.py has a table for each data set."""
    for tested, name in (
        ({"volume_path": "data/yours/test_vol_h5"}, "acdc in yours/test_vol_h5"),
        ({"volume_path": "/another/machine/ACDC/test_vol_h5"}, "acdc"),
        ({}, "acdc in mine/test_vol_h5"),
    ):
        run = write_run(tmp_path / "a", CASES, volume_path="data/mine/test_vol_h5", summary={"data": tested})
        assert read_run(run).data == name


def test_each_split_and_set_of_classes_is_compared_by_itself(tmp_path):
    for split in ("test", "val"):
        both = write_run(tmp_path / "a", CASES, split=split)
    unet = write_run(tmp_path / "c", CASES, split="val", network="unet")
    two = random_dice(3, 0, num_classes=2)
    others = write_run(tmp_path / "d", two, class_names=["one", "two"], network="unet", seed=2)
    methods = {(each.data, each.split): list(each.methods) for each in compared(both, unet, others)}
    of_others = {("acdc (one, two)", "test"): ["unet"]}
    assert methods == {("acdc", "test"): ["sim_mpnet"], ("acdc", "val"): ["sim_mpnet", "unet"]} | of_others


def test_an_untested_run_is_refused_with_the_command_that_tests_it(tmp_path, refused):
    untested = write_run(tmp_path / "b", {}, seed=2, volume_path="my volumes")
    words = f"python test_acdc.py --checkpoint {untested}/best.pth --split test --volume_path 'my volumes' --list_dir"
    refused(lambda: read_run(untested), words)


def test_pairs_are_tested_on_the_cases_that_they_share(tmp_path):
    """Six cases that all differ one way have the smallest p that six can have, 2 / 2^6."""
    dice = random_dice(8, 0, 0.6)
    results = [CaseResult(case, "mm", tuple(map(class_result, values))) for case, values in dice.items()]
    results[7] = CaseResult("patient007", "mm", (class_result(0.0, strict=NAN),) * 3)  # without a number
    better = {case: [value + 0.1 + i / 1000 for value in values] for i, (case, values) in enumerate(dice.items())}
    del better["patient006"]
    runs = write_run(tmp_path / "a", {}, results=results), write_run(tmp_path / "b", better, network="unet")
    (comparison,) = compared(*runs)
    assert any("means are not over the same cases" in note for note in notes(comparison, comparison.scores()))
    tests = paired_tests(comparison).set_index(["convention", "metric"])
    assert set(tests.index) == {(c, m) for c in ("transunet", "strict") for m in ("dice", "hd95")}
    test = tests.loc["strict", "dice"]
    assert (test["first"], test["second"], test.shared_cases, test.left_out_cases) == ("sim_mpnet", "unet", 6, 2)
    assert test.p == pytest.approx(2 / 64) and test.p_holm == pytest.approx(2 / 64)
    assert -10.6 < test.median_difference < -10
    distance = tests.loc["strict", "hd95"]
    assert math.isnan(distance.p) and "0 of 6 shared cases differ" in distance.note


def test_only_cases_of_all_seeds_count(tmp_path, caplog):
    runs = [write_run(tmp_path / "a", CASES), write_run(tmp_path / "b", {"patient001": [0.5] * 3}, seed=2)]
    assert set(compared(*runs)[0].cases["case"]) == {"patient001"}
    assert "sim_mpnet: cases not in all seeds are left out of test: 2 cases" in caplog.text


@pytest.mark.parametrize("name", ["results_test/cases.csv", "config.json", "metrics.csv"])
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, refused, name):
    path = write_run(tmp_path / "run", random_dice(3, 0)) / name
    text = path.read_bytes()
    contents = [b""]
    if name != "metrics.csv":
        contents += [b"a,b\n1", b'{"args": ', b'{"args": {}}', b"\x89PNG\r\n\xff\xfe", text[:-40]]
    if name.endswith("cases.csv"):
        contents += [text[: text.rstrip().rindex(b"\n")], text.replace(b"strict_hd95", b"hd95")]
        contents += [text.replace(b"found,0.", b"found,zero", 1)]
    for content in contents:
        path.write_bytes(content)
        refused(lambda: read_run(tmp_path / "run"), path)
