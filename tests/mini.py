"""A training run small enough for a test: drawn slices, and a network whose step takes milliseconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets import DatasetInfo, Volume
from datasets.training_set import TrainingSet
from networks import DMWLA
from networks.registry import Baseline
from utils.arguments import network_arguments, parse_training, training_parser
from utils.cli import seed_everything, set_precision
from utils.training import Trainer

DRAWINGS = DatasetInfo("drawings", ("ring", "disc"), folder="", list_dir="", splits=("train", "val"))
SIZE = 64


def drawing(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a noisy ring around a disc, (1, S, S), and its label (S, S)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(24, 40, (2, 1, 1))
    label = np.digitize(-np.hypot(y, x), [-16, -8])
    return torch.from_numpy(label / 2 + rng.normal(0, 0.1, label.shape)).float()[None], torch.from_numpy(label)


class Drawings(TrainingSet):
    def __init__(self, count: int):
        super().__init__(seed=0)
        self.names = self.samples = [str(i) for i in range(count)]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(x.numpy() for x in drawing(index))

    def __getitem__(self, index: int) -> dict:
        image, label = drawing(int(self._epoch) * 1000 + index)
        return {"image": image, "label": label, "name": self.names[index]}


class DrawnVolumes(list):
    @property
    def names(self) -> list[str]:
        return [volume.name for volume in self]


def drawn_volume(name: str) -> Volume:
    images, labels = zip(*(drawing(10**6 + i) for i in range(3)), strict=True)
    return Volume(name, torch.cat(images).numpy(), torch.stack(labels).numpy().astype(np.uint8))


class MiniNet(nn.Module):
    """A network with Sim-MPNet's interface and memory that takes a step in milliseconds."""

    def __init__(self, **config):
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        options = {name: config[name] for name in ("columns_per_cluster", "warmup_iterations")}
        self.dmwla = DMWLA(8, config["feature_dim"], config["num_classes"], **options)
        self.heads = nn.ModuleList(nn.Conv2d(8, config["num_classes"], 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.dmwla(self.stem(x))
        return [nn.functional.interpolate(head(features), x.shape[-1]) for head in self.heads]

    def memory_banks(self, decoder: bool = True):
        yield self.dmwla.bank

    gates_observed, parameter_groups = Baseline.gates_observed, Baseline.parameter_groups


def parse(folder: Path, *flags: str):
    small = (
        "--model_scale pico --pretrained none --img_size 64 --img_size_dmwla 64 --feature_dim 16 --num_workers 0 "
        "--decoder_feature_dim 16 --columns_per_cluster 20 --warmup_iterations 3 --batch_size 2 --max_epochs 2"
    )
    return parse_training(training_parser("test", DRAWINGS, output_dir=folder), DRAWINGS, [*small.split(), *flags])


def trainer(folder: Path, *flags: str, network: Callable = MiniNet, slices=5, volumes=1, device="cpu") -> Trainer:
    args, checkpoint = parse(folder, *flags)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    if device != "cpu":  # on the CPU the switches would stay for the tests after this one
        set_precision(args.amp, torch.device(device))
    data = Drawings(slices), DrawnVolumes(drawn_volume(str(i)) for i in range(volumes))
    made = Trainer(network(**network_arguments(args)), DRAWINGS, *data, args, torch.device(device))
    if checkpoint:
        made.load_state_dict(checkpoint)
    return made


def around(made: Trainer, method: str, before: Callable = lambda: None, after: Callable = lambda: None) -> None:
    """Let a trainer call ``before`` and ``after`` around each call of one of its methods."""
    call = getattr(made, method)

    def wrapped(*arguments):
        before()
        result = call(*arguments)
        after()
        return result

    setattr(made, method, wrapped)


def assert_same(a, b, where: str = "") -> None:
    """Hold two checkpoints against each other, value by value; what the clock says may differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if not str(key).endswith("seconds") and key not in ("args",):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where
