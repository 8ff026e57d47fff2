"""Rows are trained and tested over seeds: all are compared, none is done twice, and interrupted runs are resumed."""

import shutil
from pathlib import Path

import pytest

from benchmarks import ablation
from tests.comparison_runs import write_run
from tests.mini import DRAWINGS
from utils.arguments import network_arguments, parse_training, training_parser


@pytest.fixture
def started(monkeypatch):
    """Let the scripts only write what the benchmark looks for; gives what was started."""
    started = []

    def run(script, *flags):
        flags = [*map(str, flags)]
        started.append((script, *flags))
        if script == "train_acdc.py" and "--resume" not in flags:
            (write_run(Path(flags[flags.index("--output_dir") + 1]), {}, amp="bf16") / "last.pth").touch()
        elif script == "test_acdc.py":
            results = Path(flags[flags.index("--checkpoint") + 1]).parent / "results_test"
            results.mkdir(exist_ok=True)
            (results / "summary.json").touch()

    monkeypatch.setattr(ablation, "_run", run)
    return started


def call(monkeypatch, *argv) -> None:
    monkeypatch.setattr("sys.argv", ["ablation", *map(str, argv)])
    ablation.main()


def test_rows_over_seeds_are_compared_and_resumed(started, monkeypatch, tmp_path, refused):
    monkeypatch.setitem(ablation.PRESETS, "parts", {"whole": "", "the small one": "--model_scale pico"})
    argv = ["--preset", "parts", "--output_dir", tmp_path, "--seeds", 1, 2, "--", "--amp", "bf16"]
    call(monkeypatch, *argv)
    assert [script for script, *_ in started] == ["train_acdc.py", "test_acdc.py"] * 4 + ["compare.py"]
    runs = [f"{row}={tmp_path / folder}" for row, folder in (("whole", "whole"), ("the small one", "the_small_one"))]
    runs = [f"{run}/seed_{seed}" for run in runs for seed in (1, 2)]
    comparison = ("compare.py", *runs, "--split", "test", "--output_dir", str(tmp_path / "comparison"))
    assert started[-1] == comparison

    interrupted = tmp_path / "the_small_one" / "seed_2"
    (interrupted / "results_test/summary.json").unlink()
    started.clear()
    call(monkeypatch, *argv[:4], "--rows", "the small one", "--seeds", 2, "--", "--amp", "bf16")
    trained, tested, compared = started
    assert trained == ("train_acdc.py", "--resume", str(interrupted / "last.pth")) and compared == comparison
    assert tested == ("test_acdc.py", "--checkpoint", str(interrupted / "best.pth"), *"--split test --amp bf16".split())
    words = "whole/seed_1 was trained with --amp bf16 --seed 1, not ", "--batch_size 2"
    refused(lambda: call(monkeypatch, *argv, "--batch_size", 2), *words)
    (tmp_path / "whole/seed_1/last.pth").unlink()
    refused(lambda: call(monkeypatch, *argv, "--batch_size", 2), *words)
    shutil.rmtree(tmp_path / "whole/seed_1/results_test")  # flags with which nothing was trained can be corrected
    call(monkeypatch, *argv[:6], "--rows", "whole", "--", "--batch_size", 2)


@pytest.mark.parametrize("flags", ["--rows wide", "-- --seed=3"])
def test_wrong_flags_are_refused_before_anything_runs(started, monkeypatch, tmp_path, refused, flags):
    argv = ["--preset", "parts", "--output_dir", tmp_path / "out", *flags.split()]
    refused(lambda: call(monkeypatch, *argv), flags.removeprefix("-- ").removesuffix("=3"))
    assert not started and not (tmp_path / "out").exists()


def test_every_row_is_understood_by_the_training_script():
    for rows in ablation.PRESETS.values():
        configurations = []
        for flags in rows.values():
            parser = training_parser("test", DRAWINGS, output_dir=Path("nowhere"))
            args, _ = parse_training(parser, DRAWINGS, flags.split())
            configurations.append((args.network, args.wld, *network_arguments(args).values()))
        assert len(set(configurations)) == len(rows)
