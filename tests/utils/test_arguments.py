"""Arguments of training: precedence, what a resumed run refuses, and values that cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets import acdc, custom
from tests.mini import DRAWINGS, parse, trainer
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from utils.arguments import own_data, parse_training, training_parser
from utils.checkpoint import load_checkpoint
from utils.errors import RunError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    trainer(folder, "--max_epochs", "1").fit()
    return folder


def test_command_line_wins_over_the_checkpoint_and_that_over_the_defaults(run_folder):
    parser = training_parser("test", DRAWINGS, output_dir="elsewhere")
    args, _ = parse_training(parser, DRAWINGS, ["--resume", str(run_folder / "last.pth"), "--base_lr", "3e-4"])
    assert args.base_lr == 3e-4 and args.batch_size == 2 and args.output_dir == run_folder


@pytest.mark.parametrize(
    "flags",
    [
        "--columns_per_cluster 30", "--pretrained hub", "--output_dir elsewhere", "--network unet",
        "--attention plain", "--select test", "--init_from other.pth", "--seed 3", "--select_from_epoch 9",
    ],
)  # fmt: skip
def test_what_does_not_fit_the_resumed_run_is_refused(run_folder, refused, flags):
    refused(lambda: parse(run_folder, "--resume", str(run_folder / "last.pth"), *flags.split()), flags)


def test_another_data_sets_script_does_not_resume_a_run(run_folder, refused):
    parser, flags = training_parser("test", acdc.INFO), ["--output_dir", str(run_folder), "--resume", "auto"]
    refused(lambda: parse_training(parser, acdc.INFO, flags), "is a run on drawings: resume it with train_custom.py")


def test_a_new_run_takes_the_network_of_the_checkpoint_and_no_other_weights(run_folder, tmp_path, refused):
    flags = ["--init_from", str(run_folder / "best.pth")]
    args, checkpoint = parse(tmp_path, *flags, "--num_classes", "5", "--columns_per_cluster", "30")
    given = (args.num_classes, args.num_clusters, args.columns_per_cluster, args.decoder_feature_dim, args.batch_size)
    assert given == (5, 5, 30, 16, 2) and args.resume is None and "model" in checkpoint
    refused(lambda: parse(tmp_path, *flags, "--pretrained", "hub"), "leave one of them out")


def test_runs_are_not_overwritten(run_folder, tmp_path, refused):
    refused(lambda: parse(run_folder), "--resume auto")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/epoch_0298.pth").touch()
    refused(lambda: parse(tmp_path / "old"), "epoch_0298.pth, or choose another --output_dir")
    state = load_checkpoint(run_folder / "last.pth")
    older, newer = tmp_path / "best.pth", tmp_path / "last.pth"
    torch.save(state, newer)
    torch.save(state | {"iteration": state["iteration"] - 1}, older)
    refused(lambda: parse(tmp_path, "--resume", str(older)), f"older than {newer}")
    older, newer = older.rename(tmp_path / "epoch_0001.pth"), newer.rename(tmp_path / "best.pth")
    refused(lambda: parse(tmp_path, "--resume", str(older)), f"older than {newer}")


@pytest.mark.parametrize("checkpoint", ["runs/mine/best.pth", "runs/mine"])
def test_every_fold_has_folders_of_its_own(monkeypatch, checkpoint):
    monkeypatch.setattr(custom, "info_of", lambda folder, fold=0: replace(custom.INFO, folds=2))
    flags = ["--output_dir", "out/v1.0", "--checkpoint", checkpoint]
    monkeypatch.setattr("sys.argv", ["test_custom.py", "--data", "mine", "--fold", "all", *flags, "--amp", "bf16"])
    first, second = (argv for _, argv in own_data("--resume", "auto"))
    assert first == ["--resume", "auto", "--amp", "bf16", "--data", "mine", "--fold", "0", *flags]
    moved = checkpoint.replace("mine", "mine_fold1")
    assert second[-5:] == ["1", "--output_dir", "out/v1.0_fold1", "--checkpoint", moved]


def test_variant_chooses_splits_and_selection_unless_they_are_typed(tmp_path):
    release, _ = parse(tmp_path, "--variant", "release")
    assert (release.train_split, release.val_split, release.select_from_epoch) == ("train", "test", 100)
    paper, _ = parse(tmp_path)
    assert (paper.train_split, paper.val_split, paper.select_from_epoch) == ("train", "val", 1)
    typed, _ = parse(tmp_path, "--variant", "release", "--val_split", "val", "--select_from_epoch", "3")
    assert (typed.val_split, typed.select_from_epoch) == ("val", 3)
    state = {"model": {"w": torch.ones(1)}, "data": {"class_names": []}, "network": {"variant": "release"}}
    torch.save(state, tmp_path / "release.pth")
    for flags, select in (((), "val"), (("--variant", "release"), "test")):
        taken, _ = parse(tmp_path, "--init_from", str(tmp_path / "release.pth"), *flags)
        assert (taken.variant, taken.select) == ("release", select)


@pytest.mark.parametrize(
    "flags",
    [
        "--batch_size 0", "--base_lr -1", "--n_gpu 2", "--n_gpu 0 --device cuda", "--pool_momentum 7", "--ce_weight -1",
        "--accumulate 3", "--variant ours", "--model_scale huge", "--dsgim neither", "--amp int8",
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(tmp_path, flags, capsys):
    with pytest.raises((RunError, SystemExit)) as refusal:
        parse(tmp_path, *flags.split())
    assert flags.split()[0] in f"{refusal.value} {capsys.readouterr().err}"
