"""Which runs are one method, what its scores and their spread are, and what the paired tests give."""

import json
import logging
import math

import numpy as np
import pandas as pd
import pytest

from tests.comparison_runs import NAN, class_result, random_dice, write_run
from utils.comparison import (
    MEAN,
    compare,
    differing_settings,
    drop_untested,
    group_runs,
    holm,
    paired_tests,
    read_run,
    striking_cases,
)
from utils.errors import RunError
from utils.evaluation import CaseResult


@pytest.fixture(autouse=True)
def warnings_are_heard(caplog):
    caplog.set_level(logging.WARNING)


def grouped(*runs):
    """Group runs given as folders or (name, folder)."""
    named = [run if isinstance(run, tuple) else (None, run) for run in runs]
    return group_runs([(name, read_run(folder)) for name, folder in named])


def compared(*runs, splits=None):
    return compare(grouped(*runs), splits)


def score(comparison, convention="strict", name=MEAN) -> pd.Series:
    """Return the Dice of a class of the only method."""
    scores = comparison.scores().query("convention == @convention and metric == 'dice' and `class` == @name")
    assert len(scores) == 1
    return scores.iloc[0]


def test_runs_that_differ_in_nothing_but_the_seed_are_one_method(tmp_path):
    dice = random_dice(3, 0)
    first = write_run(tmp_path / "a", dice, seed=1, base_lr=1e-3, num_workers=0, device="cpu")
    second = write_run(tmp_path / "b", dice, seed=2, base_lr=1e-3, num_workers=4, device="cuda")
    other = write_run(tmp_path / "c", dice, seed=1, base_lr=1e-2)
    methods = grouped(first, other, second)
    assert [[run.folder for run in method.runs] for method in methods] == [[first, second], [other]]
    assert differing_settings([method.runs[0] for method in methods]) == ["base_lr"]


def test_a_method_is_called_by_its_network_and_what_sets_it_apart(tmp_path):
    dice = random_dice(3, 0)
    runs = [
        write_run(tmp_path / "plain", dice),  # of a version without --network and --dsgim
        write_run(tmp_path / "ablation", dice, network="sim_mpnet", dsgim="none"),
        write_run(tmp_path / "unet", dice, network="unet"),
        write_run(tmp_path / "slow", dice, network="sim_mpnet", base_lr=1e-5, compile=True),
    ]
    methods = grouped(*runs)
    names = [method.name for method in methods]
    assert names == ["sim_mpnet", "sim_mpnet, dsgim none", "unet", "sim_mpnet, base_lr 1e-05, compile"]
    assert methods[0].runs[0].settings["dsgim"] == "both" and "dsgim" not in methods[2].runs[0].settings


def test_names_of_the_user_win_and_a_run_without_one_joins_its_like(tmp_path):
    dice = random_dice(3, 0)
    runs = [write_run(tmp_path / str(seed), dice, seed=seed) for seed in (1, 2)]
    other = write_run(tmp_path / "other", dice, network="unet")
    methods = grouped(("Ours", runs[0]), runs[1], ("U-Net & co", other))
    assert [(method.name, len(method.runs)) for method in methods] == [("Ours", 2), ("U-Net & co", 1)]
    methods = grouped(("One", runs[0]), ("Two", runs[1]))
    assert [method.name for method in methods] == ["One", "Two"]
    methods = grouped(("unet", runs[0]), other)
    assert [method.name for method in methods] == ["unet", "unet (2)"]


def test_a_repeat_of_a_seed_is_left_out_and_unlike_runs_of_one_name_are_pointed_out(tmp_path, caplog):
    dice = random_dice(3, 0)
    runs = [write_run(tmp_path / name, dice) for name in "ab"]
    (method,) = grouped(*runs)
    assert [run.folder for run in method.runs] == [runs[0]]
    assert f"left out: {runs[1]} repeats" in caplog.text
    caplog.clear()
    unlike = write_run(tmp_path / "c", dice, base_lr=0.5)
    (method,) = grouped(("Ours", runs[0]), ("Ours", unlike))
    assert len(method.runs) == 2
    assert "differ in ['base_lr']" in caplog.text


def test_means_and_spreads_are_those_found_by_hand(tmp_path):
    names = {"class_names": ["lesion"], "dataset": "isic"}
    first = write_run(tmp_path / "a", {"x": [0.8], "y": [0.6]}, seed=1, **names)
    second = write_run(tmp_path / "b", {"x": [0.9], "y": [0.7]}, seed=2, **names)
    row = score(compared(first, second)[0])
    found = [row["mean"], row["sd_over_seeds"], row["sd_over_cases"]]
    np.testing.assert_allclose(found, [75, 10 / math.sqrt(2), 20 / math.sqrt(2)])
    row = score(compared(first)[0])
    np.testing.assert_allclose([row["mean"], row["sd_over_seeds"]], [70, NAN])


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


@pytest.mark.parametrize(("unit", "transunet"), [("mm", "voxels"), ("voxels", "voxels"), ("pixels", "pixels")])
def test_distances_have_the_unit_of_their_convention(tmp_path, unit, transunet):
    (comparison,) = compared(write_run(tmp_path / "a", random_dice(3, 0), unit=unit))
    units = comparison.units().set_index(["convention", "metric"])["unit"]
    assert (units["transunet", "hd95"], units["strict", "assd"], units["strict", "dice"]) == (transunet, unit, "%")


def test_sets_splits_and_classes_have_comparisons_of_their_own(tmp_path):
    dice = random_dice(3, 0)
    both = write_run(tmp_path / "a", dice, split="val")
    write_run(tmp_path / "a", dice, split="test")
    two = write_run(tmp_path / "b", random_dice(3, 0, num_classes=2), class_names=["one", "two"], num_classes=3)
    cells = write_run(tmp_path / "c", random_dice(3, 0, num_classes=1), class_names=["lesion"], dataset="isic")
    comparisons = compared(both, two, cells)
    assert [(c.dataset, c.split, len(c.class_names)) for c in comparisons] == [
        ("acdc", "test", 3), ("acdc", "test", 2), ("acdc", "val", 3), ("isic", "test", 1),
    ]  # fmt: skip
    assert len({c.title for c in comparisons}) == 4
    assert [c.split for c in compared(both, cells, splits=["test"])] == ["test", "test"]


def test_an_untested_run_is_left_out_with_the_command_that_tests_it(tmp_path, caplog):
    tested = write_run(tmp_path / "a", random_dice(3, 0), split="val")
    untested = write_run(tmp_path / "b", {}, seed=2)
    runs = [(None, read_run(folder)) for folder in (tested, untested)]
    assert drop_untested(runs) == runs[:1]
    assert f"python test_acdc.py --checkpoint {untested}/best.pth --split val" in caplog.text


def test_holm_is_as_found_by_hand():
    assert list(holm(pd.Series([0.01, 0.04, 0.03]))) == pytest.approx([0.03, 0.06, 0.06])
    assert list(holm(pd.Series([0.5, 0.9]))) == pytest.approx([1.0, 1.0])
    assert list(holm(pd.Series([0.01, NAN, 0.02]))) == pytest.approx([0.02, NAN, 0.02], nan_ok=True)


def shifted(dice: dict, by: float) -> dict:
    return {case: [value + by * (1 + i / 100) for value in values] for i, (case, values) in enumerate(dice.items())}


def test_pairs_are_tested_on_the_cases_that_they_share(tmp_path):
    """Six cases that all differ one way have the smallest p that six can have, 2 / 2^6."""
    dice = random_dice(8, 0, 0.6)
    better = shifted({case: values for case, values in dice.items() if case < "patient006"}, 0.1)
    runs = write_run(tmp_path / "a", dice), write_run(tmp_path / "b", better, network="unet")
    tests = paired_tests(compared(*runs)[0]).set_index(["convention", "metric"])
    assert set(tests.index) == {(c, m) for c in ("transunet", "strict") for m in ("dice", "hd95")}
    test = tests.loc["strict", "dice"]
    assert (test["first"], test["second"], test.shared_cases, test.left_out_cases) == ("sim_mpnet", "unet", 6, 2)
    assert test.p == pytest.approx(2 / 64) and test.p_holm == pytest.approx(2 / 64)
    assert -10.6 < test.median_difference < -10
    assert math.isnan(tests.loc["strict", "hd95"].p) and "0 cases differ" in tests.loc["strict", "hd95"].note


def test_many_pairs_are_corrected_and_seeds_are_averaged_first(tmp_path):
    dice = random_dice(12, 0, 0.5)
    runs = [
        write_run(tmp_path / f"{network}{seed}", shifted(dice, by + sign * 0.04), network=network, seed=seed)
        for network, by in (("sim_mpnet", 0.0), ("unet", 0.02), ("segformer", 0.03))
        for seed, sign in ((1, -1), (2, 1))
    ]
    tests = paired_tests(compared(*runs)[0]).query("convention == 'strict' and metric == 'dice'")
    assert list(tests.p) == pytest.approx([2 / 2**12] * 3)
    assert list(tests.p_holm) == pytest.approx([6 / 2**12] * 3)


def test_what_cannot_be_tested_is_counted_or_noted(tmp_path):
    dice = random_dice(7, 0, num_classes=1)
    absent = [CaseResult(case, "mm", (class_result(*d),)) for case, d in dice.items()]
    absent[0] = CaseResult("patient000", "mm", (class_result(0.0, strict=NAN),))
    first = write_run(tmp_path / "a", {}, results=absent, class_names=["lesion"])
    second = write_run(tmp_path / "b", shifted(dice, -0.1), network="unet", class_names=["lesion"])
    test = paired_tests(compared(first, second)[0]).query("convention == 'strict' and metric == 'dice'").iloc[0]
    assert (test.shared_cases, test.left_out_cases, test.p) == (6, 1, pytest.approx(2 / 64))
    few = [write_run(tmp_path / name, random_dice(5, 0), network=name) for name in ("sim_mpnet", "unet")]
    tests = paired_tests(compared(*few)[0])
    assert tests.p.isna().all() and tests.p_holm.isna().all() and tests.note.str.startswith("5 shared cases").all()


def test_seeds_that_were_tested_on_other_cases_count_where_all_were(tmp_path, caplog):
    dice = random_dice(4, 0)
    part = {case: values for case, values in dice.items() if case != "patient001"}
    runs = write_run(tmp_path / "a", dice, seed=1), write_run(tmp_path / "b", part, seed=2)
    assert set(compared(*runs)[0].cases["case"]) == set(part)
    assert "3 of 4 cases" in caplog.text
    alien = write_run(tmp_path / "c", {"else": [1, 1, 1]}, seed=3)
    with pytest.raises(RunError, match="no case of test in common"):
        compared(runs[0], alien)


def test_the_cases_shown_are_those_on_which_methods_differ_most(tmp_path):
    dice = random_dice(5, 0, 0.6)
    other = {**dice, "patient003": [0.0, 0.0, 0.0], "patient001": [1.0, 1.0, 1.0]}
    first, second = write_run(tmp_path / "a", dice), write_run(tmp_path / "b", other, network="unet")
    assert striking_cases(compared(first, second)[0], 2) == ["patient003", "patient001"]
    worst = min(dice, key=lambda case: np.mean(dice[case]))
    assert striking_cases(compared(first)[0], 1) == [worst]


def cut_off(path):
    path.write_text(path.read_text()[:-40])


def without_a_class(path):
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def with_text_for_a_number(path):
    path.write_text(path.read_text().replace("found,0.", "found,zero", 1))


def empty(path):
    path.write_text("")


def binary(path):
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")


def of_other_keys(path):
    path.write_text(json.dumps({"args": {}}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[("results_test/cases.csv", f) for f in (cut_off, without_a_class, with_text_for_a_number, empty, binary)],
        *[("config.json", f) for f in (cut_off, binary, of_other_keys)],
        ("metrics.csv", empty),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, name, damage):
    run = write_run(tmp_path / "run", random_dice(3, 0))
    damage(run / name)
    with pytest.raises(RunError) as raised:
        read_run(run)
    assert str(run / name) in str(raised.value) and "\n" not in str(raised.value)
