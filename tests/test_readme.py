"""Every command and example of README.md runs, in its order, in a folder that holds what a newcomer has.

The phantom stands for ACDC, a few small files for the other data; every training has the flags of SMALL too. The demo
takes minutes, so it is left out of make test. Run it with: .venv/bin/python -m pytest -m slow
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, SMALL
from tests.datasets.test_custom import decathlon
from tests.datasets.test_dicom import write_dicom
from tests.datasets.test_isic import write_raw as write_isic
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.test_docs import commands

INSTEAD = {
    "acdc --raw FOLDER": "acdc --raw data/phantom/test_vol_h5",
    "runs/synapse": "runs/acdc",
    "--compile": "",  # takes minutes on a CPU
    "torchrun --standalone --nproc_per_node 4": "python",  # one process
    "runs/acdc/best.pth --format onnx": "runs/acdc_unet/best.pth --format onnx",  # is traced in a fifth of the time
}


def test_every_command_and_example_of_the_readme_runs_in_its_order(phantom, tmp_path, run_script, monkeypatch):
    for package in ("onnxruntime", "onnxscript", "segmentation_models_pytorch"):
        pytest.importorskip(package, reason="requirements-dev.txt is not installed")
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        if script.name.startswith("train_"):
            flags = [*(SMALL[2:6] + SMALL[-8:] if "unet" in flags else SMALL), *flags]
        elif script.name == "prepare_data.py":
            flags += "--jobs", 1
        done = run_script(script, *flags, folder=tmp_path)
        assert done.status == 0, f"{script.name} {flags}: {done.error}"

    shutil.copytree(phantom, "data/phantom")
    shutil.copytree(phantom / "lists", "lists/lists_ACDC")
    decathlon(Path("Task04_Hippocampus"))
    write_isic(Path("raw"), [f"ISIC_{number:07d}" for number in range(10)])
    run(ROOT / "prepare_data.py", "isic", "--raw", "raw")
    run(ROOT / "train_isic.py")
    write_dicom(Path("dicom_series"))
    nibabel.save(nibabel.Nifti1Image(np.arange(8000, dtype=np.int16).reshape(40, 40, 5), np.eye(4)), "scan.nii.gz")
    Path("scans").mkdir()
    shutil.copy("scan.nii.gz", "scans")
    Image.fromarray(np.arange(6000, dtype=np.uint16).view(np.uint8).reshape(50, 80, 3)).save("photo.jpg")

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for theirs, ours in INSTEAD.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(block, {})
            continue
        for script, flags in commands(f"```\n{block}```"):
            run(script, *(name for flag in flags for name in (sorted(Path().glob(flag)) if "*" in flag else [flag])))
    for name in ("seg.nii.gz", "segmentations/scan.nii.gz", "mask.png", "model.onnx"):
        assert Path(name).is_file()
    assert Path("runs/acdc/inspection/patient001_frame01_slice5/gates.png").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_learns_its_phantom():
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((ROOT / "runs/demo/results_test/summary.json").read_text())["strict"]["mean"]["dice"] >= 0.80
    for place in ("best.pth", "train.log", "progress.png", "results_test/overlays"):
        assert f"runs/demo/{place}" in done.stdout and (ROOT / "runs/demo" / place).exists()
