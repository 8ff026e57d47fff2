"""Every network through the training script: a baseline, one's own and an ablation, and flags that do not fit."""

import json
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from datasets import acdc
from tests.conftest import data_flags
from tests.test_scripts import assert_one_line
from utils.arguments import network_arguments, parse_training, training_parser
from utils.errors import RunError
from utils.predictor import Predictor

COMMON = (
    "--pretrained none --img_size 32 --batch_size 4 --max_iterations 2 --num_workers 0 --device cpu --seed 3"
).split()


def parse(tmp_path, *argv):
    parser = training_parser("test", acdc.INFO, output_dir=tmp_path / "run", feature_dim=128)
    return parse_training(parser, acdc.INFO, {"val": ("train", "val"), "test": ("trainval", "test")}, list(argv))[0]


def test_a_baseline_trains_resumes_tests_and_predicts_like_sim_mpnet(phantom, run_script, tmp_path):
    pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed (requirements-baselines.txt)")
    run = tmp_path / "run"
    run_script("train_acdc.py", "--network", "unet", *data_flags(phantom), *COMMON, "--output_dir", run).succeeded()
    run_script("train_acdc.py", "--resume", run / "last.pth", "--max_iterations", 3).succeeded()
    state = torch.load(run / "last.pth", weights_only=True)
    assert state["iteration"] == 3 and state["network"]["network"] == "unet"
    rows = pd.read_csv(run / "metrics.csv")
    assert len(rows) == 2 and "k" not in rows and np.isfinite(rows["train_loss"]).all()

    run_script("test_acdc.py", "--checkpoint", run / "best.pth", *data_flags(phantom)[2:], "--is_savenii").succeeded()
    assert json.loads((run / "results_test/summary.json").read_text())["num_cases"] > 0
    scan = sorted((run / "results_test/nifti").glob("*_img.nii.gz"))[0]
    assert Predictor(run / "best.pth", "cpu")(scan).shape == nibabel.load(scan).shape


def test_a_network_gets_its_own_arguments_with_the_defaults_of_the_data_set(tmp_path):
    args = parse(tmp_path, "--network", "maxvit_unet", "--model_scale", "pico", "--img_size", "96")
    options = {"num_classes": 4, "in_channels": 1, "img_size": 96, "model_scale": "pico"}
    assert network_arguments(args) == options
    args = parse(tmp_path)
    assert args.network == "sim_mpnet" and network_arguments(args)["feature_dim"] == 128


@pytest.mark.parametrize("flags", ["--feature_dim 128", "--variant release", "--loss last", "--pretrained hub"])
def test_a_flag_of_another_network_is_refused_by_name_also_at_its_default(tmp_path, flags):
    flags = flags.split()
    assert parse(tmp_path, "--network", "attention_unet", "--pretrained", "none").pretrained == "none"
    with pytest.raises(RunError, match=f"--network attention_unet does not take {flags[0]}"):
        parse(tmp_path, "--network", "attention_unet", *flags)


def test_without_its_library_a_baseline_says_what_to_install(run_script, phantom, tmp_path, monkeypatch):
    for module in ("segmentation_models_pytorch", "monai.networks.nets"):
        monkeypatch.setitem(sys.modules, module, None)  # how a library that is not installed looks
    for network in ("unet", "attention_unet"):
        flags = ["--network", network, *data_flags(phantom), *COMMON, "--output_dir", tmp_path / "run"]
        assert_one_line(run_script("train_acdc.py", *flags), "requirements-baselines.txt", "pip install")
    assert not (tmp_path / "run").exists()
