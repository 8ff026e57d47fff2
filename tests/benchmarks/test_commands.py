"""Every benchmark's command runs, at a small size, and prints its table."""

import importlib
import shlex
import sys

import pytest
import torch

SMALL = {
    "dmwla": "--channels 8 --feature_dim 16 --side 6 --batch_size 1 --repeats 1",
    "network": "--model_scale pico --num_classes 3 --img_size 64 --img_size_dmwla 64 --repeats 1",
    "loss": "--batch_size 1 --num_classes 3 --img_size 32 --repeats 1",
    "evaluation": "--count 2 --slices 6",
    "input_pipeline": "--count 120 --workers 1",
    "complexity": "--model_scale pico --num_classes 3 --img_size 64 --img_size_dmwla 64",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Return what runs a benchmark's command in this process and gives what it prints."""
    threads = torch.get_num_threads()

    def run(name: str, flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags)])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_its_table(run, name):
    assert "| --- |" in run(name, SMALL[name])


def test_the_gpu_benchmark_is_ready_to_run(run, tmp_path):
    small = "--device cpu --forms plain bf16 --model_scale pico --num_classes 3 --img_size 64 --img_size_dmwla 64"
    assert "| plain |" in run("gpu", f"{small} --batch_size 2 --repeats 1 --output {tmp_path}")
    table = (tmp_path / "gpu.md").read_text()
    assert "| bf16 |" in table and "failed" not in table
    assert (tmp_path / "trace.json.gz").stat().st_size and "bf16" in (tmp_path / "profile.txt").read_text()


def test_the_plot_of_scaling_is_drawn(run, tmp_path, monkeypatch):
    from benchmarks import scaling

    monkeypatch.setattr(scaling, "SIDES", (4, 6))
    monkeypatch.setattr(scaling, "CLUSTERS", (2, 3))
    monkeypatch.setattr(scaling, "COLUMNS", (4, 5))
    assert "| --- |" in run("scaling", f"--channels 4 --repeats 1 --output {tmp_path}/scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size
