"""The demo, whole: minutes long, so left out of make test. Run it with: .venv/bin/python -m pytest -m slow"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_learns_its_phantom():
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((ROOT / "runs/demo/results_test/summary.json").read_text())
    assert summary["strict"]["mean"]["dice"] >= 0.80
    for place in ("best.pth", "train.log", "progress.png", "results_test/overlays"):
        assert f"runs/demo/{place}" in done.stdout and (ROOT / "runs/demo" / place).exists()
