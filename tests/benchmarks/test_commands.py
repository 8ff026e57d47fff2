"""Every benchmark's command runs, at a small size, and prints its table."""

import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NETWORK = "--model_scale pico --num_classes 3 --img_size 64 --img_size_dmwla 64"
SMALL = {
    "dmwla": "--channels 8 --feature_dim 16 --side 6 --batch_size 1 --repeats 1 --threads 1",
    "network": f"{NETWORK} --repeats 1 --threads 1 --profile 1",
    "loss": "--batch_size 1 --num_classes 3 --img_size 32 --repeats 1 --threads 1",
    "evaluation": "--count 2 --slices 6 --threads 1",
    "input_pipeline": "--count 120 --workers 1",
    "complexity": NETWORK,
}


def run(name: str, flags: str, before: str = "pass") -> str:
    """Run a benchmark in a process of its own, since it sets threads and precision; returns what it prints."""
    argv = [name, *shlex.split(flags)]
    code = f"import sys, benchmarks.{name} as b; sys.argv = {argv!r}; {before}; b.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_complexity_of_a_baseline_is_counted_part_by_part():
    pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed (requirements-baselines.txt)")
    table = run("complexity", "--network unet --num_classes 4 --img_size 64")
    assert "| encoder | 21.28 M |" in table and "| all |" in table and "the paper" not in table


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_its_table(name):
    assert "| --- |" in run(name, SMALL[name])


def test_the_gpu_benchmark_is_ready_to_run(tmp_path):
    small = f"--device cpu --forms plain bf16 {NETWORK} --batch_size 2 --repeats 1"
    assert "| plain |" in run("gpu", f"{small} --output {tmp_path}")
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| bf16 |" in table and "failed" not in table
    assert (tmp_path / "trace.json.gz").stat().st_size and "bf16" in (tmp_path / "profile.txt").read_text(
        encoding="utf-8"
    )


def test_the_plot_of_scaling_is_drawn(tmp_path):
    few = "b.SIDES, b.CLUSTERS, b.COLUMNS = (4, 6), (2, 3), (4, 5)"
    assert "| --- |" in run("scaling", f"--channels 4 --repeats 1 --threads 1 --output {tmp_path}/scaling.png", few)
    assert (tmp_path / "scaling.png").stat().st_size
