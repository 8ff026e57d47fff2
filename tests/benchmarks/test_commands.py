"""Every benchmark runs at a small size and prints its table."""

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks.complexity import count
from tests.conftest import SMALL, data_flags

pytestmark = pytest.mark.usefixtures("full_precision")  # which restores what benchmarks set

NETWORK = "--model_scale pico --num_classes 3 --img_size 64 --img_size_dmwla 64"
SPEED = {
    "network": (f"{NETWORK} --batch_size 1 --repeats 1", "training step [MiB]"),
    "dmwla": ("--channels 4 --feature_dim 8 --side 6 --batch_size 1 --repeats 1", "training step [MiB]"),
    "loss": ("--batch_size 1 --num_classes 3 --img_size 32 --repeats 1", "ours / softmaxes"),
    "evaluation": ("--slices 4", "plain / ours"),
    "input_pipeline": ("--slices 2 --workers 0 --batch_size 2 --repeats 1", "from memory"),
}


@pytest.mark.parametrize("name", SPEED)
def test_speed_prints_a_table(run_script, name):
    flags, cell = SPEED[name]
    done = run_script("benchmarks/speed.py", name, *flags.split(), "--threads", 1).succeeded()
    assert cell in done.output and "1 threads; PyTorch" in done.output


def test_complexity_counts_part_by_part(run_script):
    pytest.importorskip("segmentation_models_pytorch", reason="requirements-baselines.txt is not installed")
    done = run_script("benchmarks/complexity.py", "--network", "unet", "--num_classes", 4, "--img_size", 64).succeeded()
    cells = [[cell.strip() for cell in line.split("|")] for line in done.output.splitlines()]
    parts = {row[1]: row[2] for row in cells if len(row) > 2}
    assert "all" in parts and parts["encoder"] == "21.28" and "the paper" not in done.output
    assert "the paper" in run_script("benchmarks/complexity.py", *NETWORK.split()).succeeded().output


class Attention(nn.Module):
    """A convolution, and attention over its pixels in the form that has a fused path in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.register_buffer("memory", torch.zeros(1000))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_complexity_counts_what_is_found_by_hand():
    pixels, weights = 16 * 16, 8 * 3 * 9
    projections, attention = pixels * 4 * 8 * 8, 2 * pixels * pixels * 8
    parts = count(Attention(), 16, 3)
    assert parts["conv"] == (weights / 1e6, pixels * weights / 1e9)
    assert parts["attention"] == pytest.approx((4 * 8 * 8 / 1e6, (projections + attention) / 1e9))
    assert parts["all"] == pytest.approx([sum(both) for both in zip(parts["conv"], parts["attention"], strict=True)])


def test_gpu_runs_on_a_cpu_and_writes_table_trace_and_profile(run_script, tmp_path):
    small = f"--device cpu --forms bf16 {NETWORK} --batch_size 1 --repeats 1"
    run_script("benchmarks/gpu.py", *small.split(), "--output", tmp_path).succeeded()
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| bf16" in table and "failed" not in table
    assert (tmp_path / "trace.json.gz").stat().st_size
    assert "bf16" in (tmp_path / "profile.txt").read_text(encoding="utf-8")


def test_gates_trains_each_seed_once_and_reports_loss_and_gates(run_script, phantom, tmp_path):
    flags = ["--seeds", 1, 2, "--steps", 2, "--report", 2, "--output_dir", tmp_path, "--", *data_flags(phantom), *SMALL]
    first, again = (run_script("benchmarks/gates.py", *flags).succeeded() for _ in range(2))
    steps = pd.read_csv(tmp_path / "seed_2.csv")
    assert steps["step"].tolist() == [1, 2] and steps["gate"][0] == 0.5 and len(steps.columns) == 2 + 15
    assert "loss at 2" in first.output and "0.50 to" in first.output
    assert again.output.splitlines()[-6:-1] == first.output.splitlines()[-6:-1]
    other = run_script("benchmarks/gates.py", *flags, "--base_lr", 1)
    assert other.status == 1 and "--base_lr 1: choose another --output_dir" in other.error


def test_grid_costs_labels_and_predictions_what_is_finer_than_it(run_script, phantom, trained):
    flags = [*data_flags(phantom)[2:], "--img_size", 64, "--grids", 32, 4]
    done = run_script("benchmarks/grid.py", trained / "best.pth", *flags).succeeded()
    labels, predicted = ([float(x) for x in line.split("|")[2:5]] for line in done.output.splitlines()[-2:])
    assert labels[0] > 90 and labels == sorted(labels, reverse=True) and labels[2] < labels[0] - 10
    assert len(predicted) == 3
