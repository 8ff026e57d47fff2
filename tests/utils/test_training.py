"""The training loop on a handful of drawn slices: what a run leaves behind, and that it goes on exactly."""

import csv
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from datasets import DatasetInfo, Preprocessing
from datasets.training_set import TrainingSet
from networks import DMWLA, SimMPNet
from utils.arguments import network_arguments, parse_training, training_parser
from utils.checkpoint import build_network, load_checkpoint
from utils.cli import seed_everything
from utils.errors import RunError
from utils.training import DataFacts, Trainer

NAMES = ("ring", "disc")
DRAWINGS = DatasetInfo("drawings", NAMES, "", "", ("train", "val"), Preprocessing(), "", "")
SPLITS = {"val": ("train", "val"), "test": ("trainval", "test")}
SIZE = 64


def drawing(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a noisy ring around a disc, (1, S, S), and its label (S, S)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(24, 40, (2, 1, 1))
    label = np.digitize(-np.hypot(y, x), [-16, -8])
    image = label / 2 + rng.normal(0, 0.1, label.shape)
    return torch.from_numpy(image).float()[None], torch.from_numpy(label)


class Drawings(TrainingSet):
    def __init__(self, count: int):
        super().__init__(seed=0)
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        image, label = drawing(self.epoch * 1000 + index)
        return {"image": image, "label": label, "name": str(index)}


@dataclass
class DrawnVolume:
    name: str = "volume"
    spacing = None
    affine = None
    planar = False

    def __post_init__(self):
        slices = [drawing(10**6 + i) for i in range(3)]
        self.image = torch.cat([image for image, _ in slices]).numpy()
        self.label = torch.stack([label for _, label in slices]).numpy().astype(np.uint8)

    def network_input(self, img_size: int, part: slice) -> np.ndarray:
        return self.image[part, None]

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        return prediction


class MiniNet(nn.Module):
    """A network with Sim-MPNet's interface and memory that takes a step in milliseconds."""

    def __init__(self, **config):
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU())
        options = {name: config[name] for name in ("columns_per_cluster", "warmup_iterations")}
        self.dmwla = DMWLA(8, config["feature_dim"], config["num_classes"], **options)
        self.heads = nn.ModuleList(nn.Conv2d(8, config["num_classes"], 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.dmwla(self.stem(x))
        return [nn.functional.interpolate(head(features), x.shape[-1]) for head in self.heads]

    def memory_banks(self, decoder: bool = True):
        yield self.dmwla.bank


def parse(folder: Path, *flags: str):
    small = (
        "--model_scale pico --pretrained none --img_size 64 --img_size_dmwla 64 --feature_dim 16 --num_workers 0 "
        "--decoder_feature_dim 16 --columns_per_cluster 20 --warmup_iterations 3 --batch_size 2 --max_epochs 2"
    )
    parser = training_parser("test", SimMPNet, DRAWINGS, output_dir=folder)
    return parse_training(parser, SimMPNet, SPLITS, [*small.split(), *flags])


def trainer(folder: Path, *flags: str, network: type[nn.Module] = MiniNet) -> Trainer:
    args, checkpoint = parse(folder, *flags)
    seed_everything(args.seed, deterministic=True)
    model = network(**network_arguments(args, SimMPNet))
    made = Trainer(model, Drawings(5), [DrawnVolume()], DataFacts("drawings", NAMES), args, torch.device("cpu"))
    if checkpoint:
        made.load_state_dict(checkpoint)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    """A run of two epochs of two iterations each, past its warm-up."""
    made = trainer(tmp_path_factory.mktemp("run") / "whole")
    made.fit()
    return made


def test_a_run_folder_tells_the_whole_story(run):
    config = json.loads((run.folder / "config.json").read_text())
    assert config["args"]["batch_size"] == 2 and config["args"]["base_lr"] == 1e-4
    assert config["versions"]["torch"] == version("torch")
    assert "git" in config
    with open(run.folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in (
        "train_loss",
        "train_ce_loss",
        "train_dice_loss",
        "val_dice",
        "val_dice_ring",
        "val_dice_disc",
        "k",
        "cluster_use",
        "lr",
    ):
        assert all(np.isfinite(float(row[name])) for row in rows), name
    assert (run.folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.folder / "events").glob("events.out.tfevents.*"))
    assert {p.name for p in run.folder.glob("*.pth")} == {"last.pth", "best.pth"}
    assert not list(run.folder.rglob(".tmp*"))


def test_a_checkpoint_rebuilds_the_network_without_flags(run):
    path = run.folder / "last.pth"
    state = load_checkpoint(path)
    model = build_network(state, path, MiniNet, None).eval()
    assert state["data"]["class_names"] == NAMES
    image = drawing(7)[0][None]
    with torch.no_grad():
        for a, b in zip(model(image), run.model.eval()(image), strict=True):
            assert torch.equal(a, b)


def assert_same(a, b, where: str = "") -> None:
    """Hold two checkpoints against each other, value by value; what the clock says may differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not str(key).endswith("seconds") and key not in ("args",):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, tmp_path):
    folder = tmp_path / "interrupted"
    assert not next(run.model.memory_banks()).in_warmup
    trainer(folder, "--max_epochs", "1").fit()  # the schedule is constant, so this is where a stop would leave it
    resumed = trainer(folder, "--resume", str(folder / "last.pth"), "--max_epochs", "2")
    assert resumed.epoch == 1
    resumed.fit()
    assert_same(load_checkpoint(folder / "last.pth"), load_checkpoint(run.folder / "last.pth"))


def test_a_resumed_run_with_another_batch_size_ends_with_the_same_epoch(tmp_path):
    trainer(tmp_path, "--max_epochs", "1").fit()
    resumed = trainer(tmp_path, "--resume", str(tmp_path / "last.pth"), "--max_epochs", "3", "--batch_size", "1")
    resumed.fit()
    assert resumed.epoch == 3 and resumed.iteration == 2 + 2 * 5


def test_an_older_checkpoint_does_not_overwrite_a_newer_one(run, tmp_path):
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    state = load_checkpoint(folder / "last.pth")
    torch.save(state | {"iteration": state["iteration"] - 1}, folder / "best.pth")
    with pytest.raises(RunError, match="older than"):
        parse(folder, "--resume", str(folder / "best.pth"))


def test_best_is_never_lost_to_a_worse_epoch(tmp_path, monkeypatch):
    made = trainer(tmp_path, "--max_epochs", "3")
    scores = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(made, "validate", lambda: {"val_dice": next(scores)})
    made.fit()
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 2
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 3


def test_a_diverged_epoch_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    made = trainer(tmp_path)
    steps = made.train_step
    made.train_step = lambda batch: steps(batch) * (1 if made.epoch == 1 else float("nan"))
    with pytest.raises(RunError, match="epoch 2 is nan"):
        made.fit()
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 1


@pytest.mark.parametrize(("variant", "decoder_changes"), [("paper", True), ("release", False)])
def test_wld_sets_k_of_every_block_or_in_release_of_the_encoder(tmp_path, variant, decoder_changes):
    made = trainer(tmp_path, "--variant", variant, "--wld_start_epoch", "1", network=SimMPNet)
    made.epoch = 1
    made.update_k(torch.tensor(1.0))
    made.update_k(torch.tensor(1.2))
    ks = [int(bank.replaced_columns) for bank in made.model.memory_banks()]
    assert ks == [60] * 12 + [60 if decoder_changes else 50] * 4


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1e-4, 1e-4), ("poly", 1e-4 * 0.5**0.9, 0), ("cosine", 5e-5, 0)]
)
def test_learning_rate_schedules(tmp_path, schedule, middle, end):
    made = trainer(tmp_path, "--lr_schedule", schedule)
    total = made.total_iterations
    assert [made.learning_rate(i) for i in (0, total // 2, total)] == pytest.approx([1e-4, middle, end])


def test_max_iterations_ends_an_epoch_early(tmp_path):
    made = trainer(tmp_path, "--max_iterations", "3")
    made.fit()
    assert made.iteration == 3 and made.epoch == 2 and len(made.history) == 2


def test_too_few_slices_for_a_batch(tmp_path):
    with pytest.raises(RunError, match="--batch_size"):
        trainer(tmp_path, "--batch_size", "6")


def test_what_is_typed_wins_over_the_checkpoint_and_that_over_the_defaults(run):
    args, _ = parse(run.folder, "--resume", str(run.folder / "last.pth"), "--base_lr", "3e-4")
    assert args.base_lr == 3e-4
    assert args.output_dir == run.folder
    parser = training_parser("test", SimMPNet, DRAWINGS, output_dir="elsewhere")
    args, _ = parse_training(parser, SimMPNet, SPLITS, ["--resume", str(run.folder / "last.pth")])
    assert args.batch_size == 2 and args.model_scale == "pico" and args.output_dir == run.folder


@pytest.mark.parametrize(
    "flags", [("--columns_per_cluster", "30"), ("--pretrained", "hub"), ("--output_dir", "elsewhere")]
)
def test_what_a_resumed_run_cannot_follow_is_refused(run, flags):
    with pytest.raises(RunError, match=f"{flags[0]} {flags[1]}"):
        parse(run.folder, "--resume", str(run.folder / "last.pth"), *flags)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_resumed_run_may_change_its_weight_decay_and_precision(run, amp):
    flags = ("--resume", str(run.folder / "last.pth"), "--weight_decay", "0.5", "--amp", amp)
    assert trainer(run.folder, *flags).optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_folder_with_a_run_is_not_written_over(run):
    with pytest.raises(RunError, match="--resume"):
        parse(run.folder)


def test_variant_chooses_splits_and_selection_unless_they_are_typed(tmp_path):
    release, _ = parse(tmp_path, "--variant", "release")
    assert (release.train_split, release.val_split, release.select_from_epoch) == ("trainval", "test", 100)
    paper, _ = parse(tmp_path)
    assert (paper.train_split, paper.val_split, paper.select_from_epoch) == ("train", "val", 1)
    typed, _ = parse(tmp_path, "--variant", "release", "--val_split", "val", "--select_from_epoch", "3")
    assert (typed.val_split, typed.select_from_epoch) == ("val", 3)


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch_size", "0"),
        ("--base_lr", "-1"),
        ("--n_gpu", "2"),
        ("--n_gpu", "0", "--device", "cuda"),
        ("--max_epochs", "0"),
        ("--pool_momentum", "7"),
        ("--phi_k_momentum", "-3"),
        ("--num_clusters", "0"),
        ("--warmup_iterations", "0"),
        ("--ce_weight", "-1"),
    ],
)
def test_impossible_numbers_are_refused_by_name(tmp_path, flags):
    with pytest.raises(RunError, match=flags[0]):
        parse(tmp_path, *flags)


def test_compiled_steps_start_after_the_warm_up_and_change_nothing(run, tmp_path, monkeypatch):
    compiled_at = []

    def traced(function, **options):
        compiled_at.append(made.iteration)
        return compile(function, backend="eager", **options)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    made = trainer(tmp_path, "--compile", "--max_epochs", "3")
    made.fit()
    assert compiled_at == [3]  # --warmup_iterations 3
    plain = trainer(tmp_path / "plain", "--max_epochs", "3")
    plain.fit()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_bf16_autocast_trains(tmp_path):
    made = trainer(tmp_path, "--amp", "bf16", "--max_iterations", "4")
    made.fit()
    assert all(np.isfinite(row["train_loss"]) for row in made.history)
