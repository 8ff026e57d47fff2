"""Which runs are one method, what its scores and their spread are, and what the paired tests give."""

import json
import logging
import math

import numpy as np
import pytest

from datasets import DATASETS
from tests.comparison_runs import NAN, class_result, random_dice, write_run
from utils.comparison import (
    command_to_test,
    compare,
    differing_settings,
    group_runs,
    holm,
    paired_tests,
    read_run,
    striking_cases,
)
from utils.errors import RunError
from utils.evaluation import CaseResult

DEFAULTS = {name: {"network": "sim_mpnet", "base_lr": 1e-4, "dsgim": "both", "compile": False} for name in DATASETS}
OF_OTHERS = {"unet": {"dsgim"}}


def grouped(*runs):
    """Group runs given as folders or (name, folder)."""
    named = [run if isinstance(run, tuple) else (None, run) for run in runs]
    return group_runs([(name, read_run(folder)) for name, folder in named], DEFAULTS, OF_OTHERS)


def compared(*runs, splits=None):
    return compare(grouped(*runs), DATASETS, splits)


def test_runs_that_differ_in_nothing_but_the_seed_are_one_method(tmp_path):
    dice = random_dice(3, 0)
    first = write_run(tmp_path / "a", dice, seed=1, base_lr=1e-3, num_workers=0, device="cpu")
    second = write_run(tmp_path / "b", dice, seed=2, base_lr=1e-3, num_workers=4, device="cuda")
    other = write_run(tmp_path / "c", dice, seed=1, base_lr=1e-2)
    methods = grouped(first, other, second)
    assert [[run.folder for run in method.runs] for method in methods] == [[first, second], [other]]
    assert differing_settings(methods) == ["base_lr"]


def test_a_method_is_called_by_its_network_and_what_sets_it_apart(tmp_path):
    dice = random_dice(3, 0)
    runs = [
        write_run(tmp_path / "plain", dice),  # of a version without --network and --dsgim
        write_run(tmp_path / "ablation", dice, network="sim_mpnet", dsgim="none"),
        write_run(tmp_path / "unet", dice, network="unet"),
        write_run(tmp_path / "slow", dice, network="sim_mpnet", base_lr=1e-5, compile=True),
    ]
    names = [method.name for method in grouped(*runs)]
    assert names == ["sim_mpnet", "sim_mpnet, dsgim none", "unet", "sim_mpnet, base_lr 1e-05, compile"]


def test_what_a_network_does_not_take_is_no_setting_of_it(tmp_path):
    dice = random_dice(3, 0)
    runs = [write_run(tmp_path / name, dice, network=name, dsgim="both") for name in ("sim_mpnet", "unet")]
    ours, other = grouped(*runs)
    assert ours.settings["dsgim"] == "both" and "dsgim" not in other.settings


def test_an_argument_that_an_older_run_lacks_had_its_default(tmp_path):
    dice = random_dice(3, 0)
    old, new = write_run(tmp_path / "old", dice, seed=1), write_run(tmp_path / "new", dice, seed=2, network="sim_mpnet")
    (method,) = grouped(old, new)
    assert len(method.runs) == 2


def test_names_of_the_user_win_and_a_run_without_one_joins_its_like(tmp_path):
    dice = random_dice(3, 0)
    runs = [write_run(tmp_path / str(seed), dice, seed=seed) for seed in (1, 2)]
    other = write_run(tmp_path / "other", dice, network="unet")
    methods = grouped(("Ours", runs[0]), runs[1], ("U-Net & co", other))
    assert [(method.name, len(method.runs)) for method in methods] == [("Ours", 2), ("U-Net & co", 1)]
    methods = grouped(("One", runs[0]), ("Two", runs[1]))
    assert [method.name for method in methods] == ["One", "Two"]


def test_a_name_that_is_taken_is_not_given_to_another_method(tmp_path):
    dice = random_dice(3, 0)
    ours, other = write_run(tmp_path / "a", dice), write_run(tmp_path / "b", dice, network="unet")
    assert len({method.name for method in grouped(("unet", ours), other)}) == 2


def test_a_repeat_of_a_seed_is_left_out_and_unlike_runs_of_one_name_are_pointed_out(tmp_path, caplog):
    dice = random_dice(3, 0)
    runs = [write_run(tmp_path / name, dice) for name in "ab"]
    (method,) = grouped(*runs)
    assert [run.folder for run in method.runs] == [runs[0]]
    assert f"{runs[1]} is left out" in caplog.text
    caplog.clear()
    unlike = write_run(tmp_path / "c", dice, base_lr=0.5)
    (method,) = grouped(("Ours", runs[0]), ("Ours", unlike))
    assert len(method.runs) == 2
    assert "differ in base_lr" in caplog.text


def test_means_and_spreads_are_those_found_by_hand(tmp_path):
    names = {"class_names": ["lesion"], "dataset": "isic"}
    first = write_run(tmp_path / "a", {"x": [0.8], "y": [0.6]}, seed=1, **names)
    second = write_run(tmp_path / "b", {"x": [0.9], "y": [0.7]}, seed=2, **names)
    (comparison,) = compared(first, second)
    spread = comparison.scores["sim_mpnet"].spread("strict")
    dice = [values[0, 0] for values in (spread.mean, spread.over_seeds, spread.over_cases)]
    np.testing.assert_allclose(dice, [0.75, 0.1 / math.sqrt(2), 0.2 / math.sqrt(2)])
    one = compared(first)[0].scores["sim_mpnet"].spread("strict")
    np.testing.assert_allclose([one.mean[0, 0], one.over_seeds[0, 0]], [0.7, NAN])


def test_the_mean_over_classes_leaves_out_what_strict_leaves_out(tmp_path):
    """Of y the second class is absent: strict has no number for it, transunet has 0."""
    results = [
        CaseResult("x", "mm", (class_result(0.8), class_result(0.4))),
        CaseResult("y", "mm", (class_result(0.6), class_result(0.0, strict=NAN))),
    ]
    run = write_run(tmp_path / "a", {}, results=results, class_names=["big", "small"])
    scores = compared(run)[0].scores["sim_mpnet"]
    np.testing.assert_allclose(scores.spread("strict").mean[:, 0], [0.7, 0.4, 0.55])
    np.testing.assert_allclose(scores.spread("transunet").mean[:, 0], [0.7, 0.2, 0.45])
    np.testing.assert_allclose(scores.per_case("strict")[:, -1, 0], [0.6, 0.6])


@pytest.mark.parametrize(("unit", "transunet"), [("mm", "voxels"), ("voxels", "voxels"), ("pixels", "pixels")])
def test_distances_have_the_unit_of_their_convention(tmp_path, unit, transunet):
    (comparison,) = compared(write_run(tmp_path / "a", random_dice(3, 0), unit=unit))
    assert (comparison.distance_unit("transunet"), comparison.distance_unit("strict")) == (transunet, unit)


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
    untested = write_run(tmp_path / "b", {}, seed=2, list_dir="my/lists", volume_path="my/volumes")
    (comparison,) = compared(tested, untested)
    assert len(comparison.methods) == 1
    (line,) = caplog.text.strip().splitlines()
    command = f"python test_acdc.py --checkpoint {untested}/best.pth --split val --volume_path my/volumes"
    assert f"{command} --list_dir my/lists" in line
    with pytest.raises(RunError, match=r"python test_acdc.py --checkpoint .*/b/best.pth"):
        compared(untested)


def test_the_command_names_no_default(tmp_path):
    run = read_run(write_run(tmp_path / "a", {}, volume_path="data/ACDC/test_vol_h5", label_order=None))
    assert command_to_test(run, DATASETS["acdc"]) == f"python test_acdc.py --checkpoint {tmp_path}/a/best.pth"
    run = read_run(write_run(tmp_path / "b", {}, dataset="isic", root_path="photos", list_dir="data/ISIC/lists"))
    assert command_to_test(run, DATASETS["isic"]).endswith("b/best.pth --root_path photos")


def test_holm_is_as_found_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    without, with_nan = holm([0.01, 0.02]), holm([0.01, NAN, 0.02])
    assert [with_nan[0], with_nan[2]] == without and math.isnan(with_nan[1])


def shifted(dice: dict, by: float) -> dict:
    return {case: [value + by * (1 + i / 100) for value in values] for i, (case, values) in enumerate(dice.items())}


def test_pairs_are_tested_on_the_cases_that_they_share(tmp_path):
    """Six cases that all differ one way have the smallest p that six can have, 2 / 2^6."""
    dice = random_dice(8, 0, 0.6)
    better = shifted({case: values for case, values in dice.items() if case < "patient006"}, 0.1)
    runs = write_run(tmp_path / "a", dice), write_run(tmp_path / "b", better, network="unet")
    tests = paired_tests(compared(*runs)[0])
    assert [(t.metric, t.convention) for t in tests] == [
        ("dice", "transunet"), ("hd95", "transunet"), ("dice", "strict"), ("hd95", "strict"),
    ]  # fmt: skip
    test = tests[2]
    assert (test.first, test.second, test.shared, test.left_out) == ("sim_mpnet", "unet", 6, 2)
    assert test.p == pytest.approx(2 / 64) and test.holm == pytest.approx(2 / 64)
    assert -0.106 < test.median < -0.1
    assert math.isnan(tests[3].p) and "0 cases differ" in tests[3].note  # every HD95 is 2


def test_many_pairs_are_corrected_and_seeds_are_averaged_first(tmp_path):
    dice = random_dice(12, 0, 0.5)
    runs = [
        write_run(tmp_path / f"{network}{seed}", shifted(dice, by + sign * 0.04), network=network, seed=seed)
        for network, by in (("a", 0.0), ("b", 0.02), ("c", 0.03))
        for seed, sign in ((1, -1), (2, 1))
    ]
    tests = [t for t in paired_tests(compared(*runs)[0]) if (t.metric, t.convention) == ("dice", "strict")]
    assert [t.p for t in tests] == pytest.approx([2 / 2**12] * 3)
    assert [t.holm for t in tests] == pytest.approx([6 / 2**12] * 3)
    assert {t.shared for t in tests} == {12}


def test_too_few_cases_have_no_p_and_say_why(tmp_path):
    runs = write_run(tmp_path / "a", random_dice(5, 0)), write_run(tmp_path / "b", random_dice(5, 1), network="unet")
    for test in paired_tests(compared(*runs)[0]):
        assert math.isnan(test.p) and math.isnan(test.holm)
        assert test.note.startswith("5 shared cases")


def test_a_case_that_strict_leaves_out_is_counted_and_not_tested(tmp_path):
    dice = random_dice(7, 0, num_classes=1)
    absent = [CaseResult(case, "mm", (class_result(*d),)) for case, d in dice.items()]
    absent[0] = CaseResult("patient000", "mm", (class_result(0.0, strict=NAN),))
    names = {"class_names": ["lesion"]}
    runs = (
        write_run(tmp_path / "a", {}, results=absent, **names),
        write_run(tmp_path / "b", shifted(dice, -0.1), network="unet", **names),
    )
    test = next(t for t in paired_tests(compared(*runs)[0]) if (t.metric, t.convention) == ("dice", "strict"))
    assert (test.shared, test.left_out) == (6, 1)
    assert test.p == pytest.approx(2 / 64)


def test_seeds_that_were_tested_on_other_cases_count_where_all_were(tmp_path, caplog):
    dice = random_dice(4, 0)
    part = {case: values for case, values in dice.items() if case != "patient001"}
    runs = write_run(tmp_path / "a", dice, seed=1), write_run(tmp_path / "b", part, seed=2)
    assert compared(*runs)[0].scores["sim_mpnet"].cases == tuple(part)
    assert "3 of 4 cases" in caplog.text
    alien = write_run(tmp_path / "c", {"else": [1, 1, 1]}, seed=3)
    with pytest.raises(RunError, match="share no case"):
        compared(runs[0], alien)


def test_the_cases_shown_are_those_on_which_methods_differ_most(tmp_path):
    dice = random_dice(5, 0, 0.6)
    other = {**dice, "patient003": [0.0, 0.0, 0.0], "patient001": [1.0, 1.0, 1.0]}
    first, second = write_run(tmp_path / "a", dice), write_run(tmp_path / "b", other, network="unet")
    assert striking_cases(compared(first, second)[0], 2) == ["patient003", "patient001"]
    worst = min(dice, key=lambda case: np.mean(dice[case]))
    assert striking_cases(compared(first)[0], 1) == [worst]


def damage_no_folder(run):
    return run.parent / "nowhere", "config.json"


def damage_config(run):
    (run / "config.json").write_text("{")
    return run, "config.json"


def damage_config_keys(run):
    (run / "config.json").write_text(json.dumps({"args": {}}))
    return run, "config.json"


def damage_cut(run):
    path = run / "results_test/cases.csv"
    path.write_text(path.read_text()[:-40])
    return run, "cases.csv"


def damage_class(run):
    path = run / "results_test/cases.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    return run, "cases.csv"


def damage_number(run):
    path = run / "results_test/cases.csv"
    path.write_text(path.read_text().replace("found,0.", "found,zero", 1))
    return run, "cases.csv"


def damage_empty(run):
    (run / "results_test/cases.csv").write_text("")
    return run, "cases.csv"


def damage_other(run):
    (run / "results_test/cases.csv").write_bytes(b"\x89PNG\r\n\xff\xfe")
    return run, "cases.csv"


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, damage):
    folder, word = damage(write_run(tmp_path / "run", random_dice(3, 0)))
    with pytest.raises(RunError) as raised:
        read_run(folder)
    assert word in str(raised.value) and str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(autouse=True)
def warnings_are_heard(caplog):
    caplog.set_level(logging.WARNING)
