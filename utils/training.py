"""The training loop, as small steps that a subclass can replace.

An epoch is: train on every slice, let W-LD look at the loss, validate, write the record, save. All that a later
process needs to go on exactly is in ``last.pth``.
"""

import csv
import json
import logging
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.checkpoint import provenance, save_checkpoint
from utils.errors import RunError
from utils.evaluation import Volume, validation_dice
from utils.figures import save_progress
from utils.files import atomic_write
from utils.losses import subset_losses
from utils.wld import WeightLossDynamic

logger = logging.getLogger(__name__)

AMP_DTYPES = {"none": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast's type for each ``--amp``; tf32 is a way of multiplying float32 (``utils.cli.set_precision``)."""


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint says about its data.

    dataset: which set; class_names: without background; preprocessing: of a scan, plain values; selected_on: the
    volumes that the best epoch is chosen on, ``val`` or ``test``.
    """

    dataset: str
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    selected_on: str = "val"


class TrainingSet(Protocol):
    """What samples are trained on have: ``datasets.training_set``."""

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def keep(self, max_bytes: int) -> int: ...

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]: ...

    def to_device(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]: ...


class Trainer:
    """Trains a network on slices and validates it on volumes.

    Args:
        model: a Sim-MPNet, or any network with its interface.
        train_set: slices or images; ``set_epoch`` is called before each epoch.
        val_set: volumes on which the best epoch is chosen.
        facts: what the data are.
        args: the merged arguments (see ``utils.arguments``).
        device: where to train.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: TrainingSet,
        val_set: Sequence[Volume],
        facts: DataFacts,
        args: Namespace,
        device: torch.device,
    ):
        self.args, self.facts, self.device = args, facts, device
        self.compiled_losses = None
        self.model = model.to(device, memory_format=torch.channels_last)
        self.train_set, self.val_set = train_set, val_set
        self.folder = Path(args.output_dir)
        self.release = args.variant == "release"
        self.dice_name = "Dice on the test volumes" if facts.selected_on == "test" else "validation Dice"
        self.amp_dtype = AMP_DTYPES[args.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.base_lr, weight_decay=args.weight_decay, fused=True
        )
        self.wld = WeightLossDynamic(args.wld_start_epoch, args.replaced_columns)
        self.loader_generator = torch.Generator()
        self.loader = self.build_loader()
        self.epoch = 0  # epochs done
        self.iteration = 0  # iterations done
        self.total_iterations = self.count_iterations()
        self.history: list[dict[str, float]] = []
        self.best_dice = -math.inf

    def build_loader(self) -> DataLoader:
        """Return the loader of shuffled batches; a last batch that is not full is left out."""
        batch_size = self.args.batch_size
        if len(self.train_set) < batch_size:
            raise RunError(
                f"{len(self.train_set)} training samples do not fill a batch of {batch_size}: lower --batch_size"
            )
        return DataLoader(
            self.train_set,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.args.num_workers,
            persistent_workers=self.args.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=self.train_set.collate,
            generator=self.loader_generator,
        )

    def count_iterations(self) -> int:
        """Return the iteration at which the run ends, those done included."""
        end = self.iteration + (self.args.max_epochs - self.epoch) * len(self.loader)
        return end if self.args.max_iterations is None else min(end, self.args.max_iterations)

    def fit(self) -> None:
        """Train until the last epoch or iteration."""
        self.write_config()
        with self.open_events() as events:
            while self.iteration < self.total_iterations:
                row = self.train_epoch()
                self.check_finite(row)
                if self.is_due():
                    row |= self.validate()
                self.history.append(row)
                self.record(row, events)
                self.save(row)
        self.log_end()

    def train_epoch(self) -> dict[str, float]:
        """Train on every batch once and return the epoch's row of ``metrics.csv``."""
        start = time.perf_counter()
        self.epoch += 1
        self.model.train()
        self.train_set.set_epoch(self.epoch)
        self.loader_generator.manual_seed(self.args.seed * 100_003 + self.epoch)  # the order is the epoch's own
        for bank in self.model.memory_banks():
            bank.key_counts.zero_()

        totals = torch.zeros(3, device=self.device)
        batches = min(len(self.loader), self.total_iterations - self.iteration)
        bar = tqdm(self.loader, total=batches, desc=f"epoch {self.epoch}", disable=None, leave=False)
        for batch in islice(bar, batches):
            losses = self.train_step(batch)
            totals += losses
            if self.release:
                self.update_k(losses[0])
        means = totals / batches
        if not self.release:
            self.update_k(means[0])
        banks = list(self.model.memory_banks())
        return {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": means[0].item(),
            "train_ce_loss": means[1].item(),
            "train_dice_loss": means[2].item(),
            "k": int(banks[0].replaced_columns),
            "k_decoder": int(banks[-1].replaced_columns),
            "cluster_use": np.mean([(bank.key_counts > 0).float().mean().item() for bank in banks]).item(),
            "train_seconds": time.perf_counter() - start,
        }

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """Do one iteration and return its loss and the two sums that it is made of, (3,) on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.iteration)
        image, label = self.train_set.to_device(batch, self.device)  # (B, C, S, S), (B, S, S)
        losses = self.losses
        if self.args.compile and not any(bank.in_warmup for bank in self.model.memory_banks()):
            self.compiled_losses = losses = self.compiled_losses or torch.compile(self.losses, dynamic=False)
        loss, cross_entropy, dice = losses(image, label)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        return torch.stack([loss, cross_entropy, dice]).detach()

    def losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the subset loss and the two sums that it is made of, of images (B, C, S, S) and labels (B, S, S)."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.model(image)
        return subset_losses(logits, label, self.args.ce_weight, self.args.dice_weight)

    def learning_rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration (from 0)."""
        args, done = self.args, iteration / self.total_iterations
        if args.lr_schedule == "poly":
            return args.base_lr * (1 - done) ** 0.9
        if args.lr_schedule == "cosine":
            return args.base_lr * 0.5 * (1 + math.cos(math.pi * done))
        return args.base_lr

    def update_k(self, loss: Tensor) -> None:
        """Let W-LD set K: of every block, or in ``release`` of the encoder's."""
        k = self.wld.step(loss, self.epoch)
        if k is not None:
            for bank in self.model.memory_banks(decoder=not self.release):
                bank.replaced_columns.copy_(k)

    def is_due(self) -> bool:
        """Whether this epoch is validated: every ``--eval_interval`` and the last."""
        return self.epoch % self.args.eval_interval == 0 or self.iteration >= self.total_iterations

    def validate(self) -> dict[str, float]:
        """Return the mean validation Dice and that of each class, of volumes at their own resolution."""
        start = time.perf_counter()
        mean, per_class = validation_dice(
            self.model,
            self.val_set,
            len(self.facts.class_names) + 1,
            self.args.img_size,
            self.args.eval_batch_size,
            self.device,
            self.amp_dtype,
        )
        names = (f"val_dice_{name.replace(' ', '_')}" for name in self.facts.class_names)
        classes = dict(zip(names, per_class.tolist(), strict=True))
        return {
            "selected_on": self.facts.selected_on,
            "val_dice": mean,
            **classes,
            "val_seconds": time.perf_counter() - start,
        }

    def check_finite(self, row: dict[str, float]) -> None:
        """Stop a run whose loss has become NaN or infinite; the last checkpoint is of the epoch before."""
        if not math.isfinite(row["train_loss"]):
            go_on = f", and go on from {self.folder}/last.pth, which is of the epoch before" if self.history else ""
            raise RunError(
                f"the loss of epoch {self.epoch} is {row['train_loss']} at learning rate {row['lr']:.2e}: lower "
                f"--base_lr or use --amp none{go_on}"
            )

    def record(self, row: dict[str, float], events) -> None:
        """Write the epoch to the log, ``metrics.csv``, TensorBoard and ``progress.png``."""
        dice = f", {self.dice_name} {100 * row['val_dice']:.2f} %" if "val_dice" in row else ""
        logger.info(
            "epoch %d/%d: loss %.4f%s, K %d, lr %.2e, %.0f s",
            self.epoch, self.args.max_epochs, row["train_loss"], dice, row["k"], row["lr"], row["train_seconds"],
        )  # fmt: skip
        for name, value in row.items():
            if name not in ("epoch", "selected_on"):
                events.add_scalar(name, value, self.epoch)
        events.flush()
        fields = list(dict.fromkeys(name for r in self.history for name in r))
        with atomic_write(self.folder / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.history)
        if self.is_due():
            save_progress(self.folder / "progress.png", self.history)

    def save(self, row: dict[str, float]) -> None:
        """Write ``best.pth`` where this epoch is the best so far, and ``last.pth``."""
        is_best = self.epoch >= self.args.select_from_epoch and row.get("val_dice", -math.inf) > self.best_dice
        if is_best:
            self.best_dice = row["val_dice"]
        state = self.state_dict()
        if is_best:
            save_checkpoint(self.folder / "best.pth", state)
        save_checkpoint(self.folder / "last.pth", state)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on exactly, and to rebuild the network without flags."""
        return {
            "model": self.model.state_dict(),
            "network": self.model.config,
            "data": asdict(self.facts),
            "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
            "epoch": self.epoch,
            "iteration": self.iteration,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "wld": self.wld.state_dict(),
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            "history": self.history,
            "best_dice": self.best_dice,
            **provenance(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args.weight_decay  # which may have been typed anew
        if state["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(state["scaler"])
        self.wld.load_state_dict(state["wld"])
        self.epoch, self.iteration = state["epoch"], state["iteration"]
        self.total_iterations = self.count_iterations()
        self.history, self.best_dice = state["history"], state["best_dice"]
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])

    def write_config(self) -> None:
        """Write the merged arguments, the git revision and the versions; a resumed run keeps the first ones."""
        content = {"args": vars(self.args), "data": asdict(self.facts), **provenance()}
        name = f"config_resumed_{self.epoch}.json" if self.epoch else "config.json"
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        logger.info(
            "%.2f M parameters, %d training samples, %d validation cases, %d iterations, on %s; run folder %s",
            parameters, len(self.train_set), len(self.val_set), self.total_iterations, self.device, self.folder,
        )  # fmt: skip

    def open_events(self):
        """Return the TensorBoard writer; a resumed run drops the events after its checkpoint."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self.folder / "events"), purge_step=self.epoch + 1)

    def log_end(self) -> None:
        if self.best_dice > -math.inf:
            best = f"best {self.dice_name} {100 * self.best_dice:.2f} % in {self.folder / 'best.pth'}"
        else:
            best = f"no epoch from {self.args.select_from_epoch} on was validated, so there is no best.pth"
        logger.info("done after %d iterations: %s", self.iteration, best)
