"""Rows are trained and tested over seeds: all are compared, none is done twice, and interrupted runs are resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ablation
from networks import NETWORKS
from tests.conftest import ROOT
from tests.mini import DRAWINGS, SPLITS
from tests.test_scripts import folders
from utils.arguments import network_arguments, parse_training, training_parser
from utils.errors import RunError

FEW = "--img_size 64 --batch_size 4 --max_iterations 2 --num_workers 0 --device cpu".split()


@pytest.fixture
def example():
    """Register the network of ``docs/adding_a_network.md``, which trains in no time."""
    text = (ROOT / "docs/adding_a_network.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    yield "two_convolutions"
    del NETWORKS["two_convolutions"]


@pytest.fixture
def started(monkeypatch, run_script):
    """Let the benchmark start its scripts in this process; gives what it started."""
    started = []

    def run(script, *flags):
        started.append((script, *map(str, flags)))
        done = run_script(script, *flags)
        if done.status:
            raise RunError(done.error)

    monkeypatch.setattr(ablation, "_run", run)
    return started


def call(monkeypatch, *argv) -> None:
    monkeypatch.setattr("sys.argv", ["ablation", *map(str, argv)])
    ablation.main()


def test_rows_over_seeds_are_compared_and_resumed(example, phantom, started, monkeypatch, tmp_path):
    rows = {"narrow": f"--network {example} --width 4", "the wide one": f"--network {example} --width 8"}
    monkeypatch.setitem(ablation.PRESETS, "networks", rows)
    out = tmp_path / "out"
    argv = ["--preset", "networks", "--output_dir", out, "--seeds", 1, 2, "--", *folders(phantom), *FEW]
    call(monkeypatch, *argv)
    assert [script for script, *_ in started] == ["train_acdc.py", "test_acdc.py"] * 4 + ["compare.py"]
    page = out / "comparison" / "comparison.md"
    table = page.read_text(encoding="utf-8")
    assert all(re.search(rf"\| {row} +\| +2 \|", table) for row in rows)

    interrupted = out / "the_wide_one" / "seed_2"
    (interrupted / "results_test/summary.json").unlink()
    started.clear()
    call(monkeypatch, *argv)
    assert [flags[:3] for flags in started[:-1]] == [
        ("train_acdc.py", "--resume", str(interrupted / "last.pth")),
        ("test_acdc.py", "--checkpoint", str(interrupted / "best.pth")),
    ]
    started.clear()
    call(monkeypatch, *argv[:4], "--rows", "narrow", "--seeds", 2, "--", *folders(phantom), *FEW)  # one of four runs
    assert [script for script, *_ in started] == ["compare.py"] and page.read_text(encoding="utf-8") == table
    with pytest.raises(RunError, match=r"narrow/seed_1 was trained with .*--batch_size 4"):
        call(monkeypatch, *argv, "--batch_size", 2)


def test_ctrl_c_waits_until_the_training_has_saved(tmp_path):
    (tmp_path / "training.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(1)\n    pathlib.Path('saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\npathlib.Path('started').touch()\ntime.sleep(60)\n"
    )
    code = f"from benchmarks import ablation; ablation._run({str(tmp_path / 'training.py')!r})"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    assert (tmp_path / "saved").exists()


def test_wrong_flags_are_refused_before_anything_runs(started, monkeypatch, tmp_path):
    for flags, words in ((["--rows", "wide"], "--rows wide"), (["--", "--seed=3"], "--seed after --")):
        with pytest.raises(RunError, match=words):
            call(monkeypatch, "--preset", "parts", "--output_dir", tmp_path / "out", *flags)
    assert not started and not (tmp_path / "out").exists()


def test_every_row_is_understood_by_the_training_script():
    for rows in ablation.PRESETS.values():
        configurations = []
        for flags in rows.values():
            parser = training_parser("test", DRAWINGS, output_dir=Path("nowhere"))
            args, _ = parse_training(parser, DRAWINGS, SPLITS, flags.split())
            configurations.append((args.network, args.wld, *network_arguments(args).values()))
        assert len(set(configurations)) == len(rows)
