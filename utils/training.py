"""The training loop. An epoch trains on every batch, validates, lets W-LD set K, and saves its record and a checkpoint.

``last.pth`` holds everything that a later process needs to continue exactly, even within an epoch. Under torchrun,
every rank runs this loop on its part of each batch, and rank 0 writes the files.
"""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import DatasetInfo, Volume
from datasets.errors import counted
from datasets.training_set import TrainingSet
from networks.ranks import rank, world_size
from utils.checkpoint import describe_data, provenance
from utils.cli import AMP_DTYPES, random_state, set_random_state
from utils.distribution import EpochBatches, distribute, gather_over_ranks, largest_over_ranks, share_buffers
from utils.errors import RunError, Stopped
from utils.evaluation import mean_dice, predict_case
from utils.figures import dice_name
from utils.losses import WeightLossDynamic, subset_losses
from utils.metrics import dice_only
from utils.run_folder import RunFolder
from utils.watch import NumberWatch, StopSignals, known_errors

logger = logging.getLogger(__name__)

# Attributes of the trainer that are saved in every checkpoint.
COUNTED = ("epoch", "iteration", "history", "best_dice", "best_epoch")
COUNTED_IN_EPOCH = ("samples", "steps", "seconds", "totals")


class Trainer:
    """Trains a network on slices or images, and chooses its best epoch on volumes or images.

    model: a Sim-MPNet, or a network with its interface (``networks.registry``); args: what ``parse_training`` returned.
    """

    def __init__(
        self, model: nn.Module, info: DatasetInfo, train_set: TrainingSet, val_set: Sequence[Volume],
        args: Namespace, device: torch.device,
    ):  # fmt: skip
        self.args, self.device = args, device
        self.train_set, self.val_set = train_set, val_set
        self.data = {  # what every checkpoint stores about its data
            "dataset": info.name,
            "class_names": info.names_for(args.num_classes),
            "preprocessing": info.preprocessing.to_dict(),
            "channels": info.channels,
            "selected_on": args.selected_on,
            "kind": getattr(train_set, "kind", ""),
        }
        self.described = describe_data(train_set, val_set, self.data["class_names"])
        self.seen: dict[str, list[str]] = {}  # by data set: the cases that the initial weights were trained on
        self.release = args.variant == "release"
        self.model = model.to(device, memory_format=torch.channels_last)
        self.network = distribute(self.model, device)  # the model as a training step calls it
        self.banks = list(self.model.memory_banks())
        self.amp_dtype = AMP_DTYPES[args.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        groups = self.model.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, args.base_lr, weight_decay=args.weight_decay, fused=True)
        if args.compile:
            self.losses = torch.compile(self.losses, dynamic=False)
        self.wld = WeightLossDynamic(math.inf if args.wld == "none" else args.wld_start_epoch, args.replaced_columns)
        self.run = RunFolder(args.output_dir)
        self.writes = rank() == 0
        self.signals = StopSignals()
        self.watch = NumberWatch(device, args.amp, self.run.last)
        self.batches = EpochBatches(len(train_set), args.batch_size, args.seed)
        self.loader = self.build_loader()

        self.epoch = self.iteration = 0  # finished so far
        # In the current epoch: samples, steps and seconds so far, and the sums of the three losses.
        self.samples, self.steps, self.seconds = 0, 0, 0.0
        self.totals = torch.zeros(3, device=device)
        self.history: list[dict[str, Any]] = []  # one row of metrics.csv for each epoch
        self.best_dice, self.best_epoch = -math.inf, 0
        self.saved_at = time.monotonic()
        self.total_iterations = self.count_iterations()

    def build_loader(self) -> DataLoader:
        """Return the loader of this rank's batches; raise RunError if there are too few samples for one batch."""
        have, need = len(self.train_set), self.batches.samples_per_step
        if have < need:
            raise RunError(f"{counted(have, 'training sample')} cannot fill a batch of {need}: lower --batch_size")
        return DataLoader(
            self.train_set,
            batch_sampler=self.batches,
            num_workers=self.args.num_workers,
            persistent_workers=self.args.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=self.signals.ignore_in_worker,
            generator=torch.Generator(),  # its own, so that a new loader does not change the global one
        )

    def count_iterations(self) -> int:
        """Return the iteration at which the run ends, counted from its start."""
        later_epochs = self.args.max_epochs - self.epoch - bool(self.samples)  # `rest` counts the epoch in progress
        rest = self.batches.count(self.samples) if self.samples else 0
        end = self.iteration + rest + max(later_epochs, 0) * self.batches.count()
        return max(self.iteration, min(end, self.args.max_iterations or end))

    def fit(self) -> None:
        """Train until the last epoch or iteration.

        Raises Stopped after a signal, once ``last.pth`` is saved. Raises RunError if a loss or gradient is not finite
        or the memory is full, and RunError or OSError if the disk is full; ``last.pth`` then stays as it was.
        """
        if self.writes and self.args.resume:
            is_best = self.best_epoch == self.epoch > 0 and not self.samples
            self.run.take_over(self.args.resume, self.iteration, is_best)
        if not self.is_over():
            if self.writes:
                config = {"args": vars(self.args), "data": self.data, "ranks": world_size(), **provenance()}
                self.run.open(config, self.history, resumed=self.iteration > 0)
            self.announce()
        try:
            with self.signals:
                while not self.is_over():
                    self.train_epoch()
                    due = (self.epoch + 1) % self.args.eval_interval == 0 or self.iteration >= self.total_iterations
                    self.close_epoch(self.validate() if due else {})
        finally:
            self.loader = None  # ends its workers
            self.run.raise_errors(wait=True)
        best = f"best {dice_name(self.args.selected_on)} {100 * self.best_dice:.2f} % in {self.run.best}"
        if self.best_dice == -math.inf:
            best = f"no epoch from {self.args.select_from_epoch} on has a validation Dice, so there is no best.pth"
        logger.info("done after %s: %s", counted(self.iteration, "iteration"), best)

    def announce(self) -> None:
        """Log sizes, device and folder of the run; warn if its settings make it do less than a user may expect."""
        iterations = counted(self.total_iterations, "iteration")
        logger.info(
            "%.2f M parameters, %s, %s, %s, on %d x %s; run folder %s",
            sum(p.numel() for p in self.model.parameters()) / 1e6, counted(len(self.train_set), "training sample"),
            counted(len(self.val_set), "validation case"), iterations, world_size(), self.device, self.run.path,
        )  # fmt: skip
        before, now = self.optimizer.param_groups[0]["lr"], self.learning_rate(self.iteration - 1)
        if self.iteration and not math.isclose(before, now):
            text = "iteration %d had learning rate %.3g, with these flags %.3g: the result differs from that of one run"
            logger.warning(text, self.iteration, before, now)
        # Weights of another run may bring a memory that is past its warm-up.
        waiting = [bank for bank in self.banks if bank.in_warmup and bank.sampling_steps >= self.total_iterations]
        if waiting and not self.iteration and not self.release:  # there a validation fills the memory, too
            text = "the run ends after %s, before its memory is used: its warm-up has %s: lower --warmup_iterations"
            logger.warning(text, iterations, counted(waiting[0].sampling_steps, "step"))
        first = self.wld.start_epoch + (not self.release)  # at the end of an epoch K is set for the next one
        if self.banks and self.args.max_epochs < first < math.inf:
            logger.info("the memory's K stays as it is: W-LD sets it from epoch %d on", self.wld.start_epoch)

    def is_over(self) -> bool:
        """Return whether all iterations are done and the last epoch is recorded."""
        return self.iteration >= self.total_iterations and not self.samples

    def train_epoch(self) -> None:
        """Train on all batches of the epoch, or on those that are left after a resume."""
        self.model.train()
        self.train_set.set_epoch(self.epoch + 1)
        self.batches.start(self.epoch + 1, self.samples)
        if not self.samples:
            self.steps, self.seconds = 0, 0.0
            self.totals.zero_()
            for bank in self.banks:
                bank.key_counts.zero_()

        left = min(len(self.batches), self.total_iterations - self.iteration)
        start = time.perf_counter() - self.seconds
        remedy = (
            f"--batch_size {self.args.batch_size} --accumulate {self.args.accumulate} need more: raise --accumulate "
            "to compute a batch in more parts, lower --batch_size or the image sizes, or use --amp bf16"
        )
        silent = True if rank() else None  # None: a progress bar on a terminal only
        batches = tqdm(islice(self.loader, left), f"epoch {self.epoch + 1}", left, leave=False, disable=silent)
        with known_errors(remedy):
            for batch in batches:
                losses = self.train_step(batch)  # (3,)
                self.totals += losses
                self.samples += self.batches.samples_per_step
                self.steps += 1
                if self.release:
                    self.update_k(losses[0])
                self.seconds = time.perf_counter() - start
                self.stop_if_asked()
                self.save_if_due()
        self.watch.check()

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """Do one iteration; return the loss and the sums of its cross entropies and Dice losses, (3,) on the device."""
        lr = self.learning_rate(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        image = batch["image"].to(self.device, non_blocking=True)  # (B, C, S, S)
        label = batch["label"].to(self.device, non_blocking=True)  # (B, S, S)

        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(image, label)  # (3,)
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        self.watch.add(torch.stack([losses[0], norm]), self.iteration, lr, batch.get("name", ()))
        return losses

    def backward(self, image: Tensor, label: Tensor) -> Tensor:
        """Compute the gradient of a batch, in ``--accumulate`` parts; return the mean losses of the parts, (3,)."""
        parts = self.args.accumulate
        total = torch.zeros(3, device=self.device)
        for i, (x, y) in enumerate(zip(image.chunk(parts), label.chunk(parts), strict=True), 1):
            last = i == parts
            for bank in self.banks:
                bank.writable = last  # one step updates the memory once
            # The ranks add up their gradients in the last part.
            with nullcontext() if last or world_size() == 1 else self.network.no_sync():
                losses = self.losses(x, y)
                self.scaler.scale(losses[0] / parts).backward()
            total += torch.stack(losses).detach() / parts
        return total

    def losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and the two sums of ``subset_losses`` for images (B, C, S, S) and labels (B, S, S)."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.network(image)  # four maps (B, num_classes, S, S)
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
        """Let W-LD set K of every block, in ``release`` only of the blocks in the encoder."""
        k = self.wld.step(loss, self.epoch + 1)
        if k is not None:
            for bank in self.model.memory_banks(decoder=not self.release):
                bank.replaced_columns.copy_(k)

    def save_if_due(self) -> None:
        """Save within an epoch if ``--checkpoint_iterations`` or ``--checkpoint_minutes`` asks for it."""
        args = self.args
        if self.iteration == 1:
            logger.info("the first iteration took %.1f s; an epoch has %d", self.seconds, len(self.batches))
        minutes = (time.monotonic() - self.saved_at) / 60
        due = bool(args.checkpoint_minutes) and minutes >= args.checkpoint_minutes
        due |= bool(args.checkpoint_iterations) and self.iteration % args.checkpoint_iterations == 0
        if largest_over_ranks(int(due)):
            self.save()
        self.run.raise_errors()

    def stop_if_asked(self) -> None:
        """Save and raise Stopped if any rank has received a signal."""
        if number := largest_over_ranks(self.signals.received):
            self.save()
            again = f"the same command with --resume auto continues from {self.run.last}"
            raise Stopped(number, f"after iteration {self.iteration}: {again}")

    def validate(self) -> dict[str, Any]:
        """Return the Dice of the validation cases at their own resolution (mean and by class), and the mean gates.

        Each rank predicts its share of the cases. In ``release``, evaluation writes the memory: rank 0 predicts all.
        """
        import pandas as pd

        args, start = self.args, time.perf_counter()
        share_buffers(self.model)
        cases = range(rank(), len(self.val_set), world_size())
        if self.release:
            cases = range(len(self.val_set)) if self.writes else ()
        dice = {}
        with known_errors(f"lower --eval_batch_size {args.eval_batch_size}"), self.model.gates_observed() as gates:
            for i in cases:
                if self.signals.received and not self.release:
                    break
                case, size = self.val_set[i], args.img_size
                prediction = predict_case(self.model, case, size, args.eval_batch_size, self.device, self.amp_dtype)
                dice[i] = dice_only(prediction, case.label, args.num_classes)
        if self.release:  # validating again would write the memory twice, so a signal waits for the next step
            share_buffers(self.model)
            for bank in self.banks:
                bank.reread()
        else:
            self.stop_if_asked()

        passed = {name: [x for m in maps for x in m.mean((1, 2, 3)).tolist()] for name, maps in gates.items()}
        shares = gather_over_ranks((dice, pd.DataFrame(passed)))  # gates: one row per image
        dice = {i: scores for part, _ in shares for i, scores in part.items()}
        gates = pd.concat([part for _, part in shares]).mean()
        mean, by_class = mean_dice([dice[i] for i in sorted(dice)])
        columns = [f"val_dice_{name.replace(' ', '_')}" for name in self.data["class_names"]]
        return {
            "selected_on": args.selected_on,
            "val_dice": mean,
            **dict(zip(columns, by_class.tolist(), strict=True)),
            **gates.to_dict(),
            "val_seconds": time.perf_counter() - start,
        }

    def close_epoch(self, scores: dict[str, Any]) -> None:
        """Let W-LD set K, record the epoch and save it."""
        means = self.totals / self.steps
        memory = {}
        if self.banks:
            memory = {
                "k": int(self.banks[0].replaced_columns),
                "k_decoder": int(self.banks[-1].replaced_columns),
                "cluster_use": np.mean([(bank.key_counts > 0).float().mean().item() for bank in self.banks]).item(),
            }
        if not self.release:  # after `memory` has read the K of this epoch; the new K is for the next
            self.update_k(means[0])
        self.epoch += 1
        self.samples = 0
        row = {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": means[0].item(),
            "train_ce_loss": means[1].item(),
            "train_dice_loss": means[2].item(),
            **memory,
            "train_seconds": self.seconds,
            **({"overflows": self.watch.overflows} if self.args.amp == "fp16" else {}),
            **scores,
        }
        self.history.append(row)
        is_best = self.epoch >= self.args.select_from_epoch and row.get("val_dice", -math.inf) > self.best_dice
        if is_best:
            self.best_dice, self.best_epoch = row["val_dice"], self.epoch
        if self.writes:
            self.run.record(self.history, self.args.max_epochs, self.args.select_from_epoch)
        self.save(is_best, self.args.keep)

    def save(self, is_best: bool = False, keep: int = 0) -> None:
        """Write ``last.pth`` (see ``RunFolder.save``); raise RunError if a loss or gradient so far is not finite."""
        self.watch.check()
        state = self.state_dict()
        if self.writes:
            self.run.save(state, is_best, keep)
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue exactly, and to rebuild the network without flags."""
        return {
            "model": self.model.state_dict(),
            "network": self.model.config,
            "data": self.data,
            "described": self.described,
            "seen": self.seen,
            "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
            **{name: getattr(self, name) for name in COUNTED},
            "in_epoch": {name: getattr(self, name) for name in COUNTED_IN_EPOCH},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "wld": self.wld.state_dict(),
            "overflows": self.watch.overflows,
            "random": gather_over_ranks(random_state(self.device)),
            **provenance(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that ``state_dict`` made."""
        self.model.load_state_dict(state["model"])
        if len(state["optimizer"]["param_groups"]) < len(self.optimizer.param_groups):  # an older run has one group
            self.optimizer = torch.optim.AdamW([{"params": list(self.model.parameters())}], fused=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args.weight_decay  # the user may have changed it
            group.setdefault("lr_scale", 1.0)  # an older run has none
        if state["scaler"]:  # empty unless fp16
            self.scaler.load_state_dict(state["scaler"])
        self.wld.load_state_dict(state["wld"])
        self.watch.overflows = state["overflows"]
        self.seen = state.get("seen", {})
        self.data["selected_on"] = state["data"].get("selected_on", self.data["selected_on"])
        for name in COUNTED:
            setattr(self, name, state.get(name, 0))  # older checkpoints have no best_epoch
        for name in COUNTED_IN_EPOCH:
            setattr(self, name, state["in_epoch"][name])
        self.totals = self.totals.to(self.device)
        self.total_iterations = self.count_iterations()
        if len(state["random"]) == world_size():
            set_random_state(state["random"][rank()], self.device)
