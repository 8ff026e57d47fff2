"""The training loop, as small steps that a subclass can replace.

An epoch is: train on every slice, validate, let W-LD look at the loss, write the record, save. All that a later
process needs to go on exactly is in ``last.pth``, in the middle of an epoch too. Under torchrun every rank runs this
loop on its part of each batch; rank 0 writes.
"""

import csv
import fcntl
import json
import logging
import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from datasets.files import atomic_write, remove_temporaries
from networks.complexity import count_parameters
from networks.ranks import rank, world_size
from utils.checkpoint import load_checkpoint, provenance, save_checkpoint
from utils.cli import AMP_DTYPES
from utils.distribution import distribute, gather_over_ranks, largest_over_ranks, share_buffers
from utils.errors import RunError, Stopped
from utils.evaluation import Volume, case_dice, mean_dice
from utils.events import EventFile
from utils.figures import save_progress
from utils.losses import WeightLossDynamic, subset_losses
from utils.watch import NumberWatch, Step, StopSignals, out_of_memory

logger = logging.getLogger(__name__)

GATE_SHUT = 0.01
"""What a gate lets through of an image, on average, from which on it is called shut."""


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint says about its data.

    dataset: which set; class_names: without background; preprocessing: of a scan, plain values; selected_on: the
    volumes that the best epoch is chosen on, ``val`` or ``test``; kind: what a sample shows, of a set that is prepared
    in more ways than one.
    """

    dataset: str
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    selected_on: str = "val"
    kind: str = ""


class TrainingSet(Protocol):
    """What samples are trained on have: ``datasets.training_set``."""

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def keep(self, max_bytes: int) -> int: ...


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch, in an order of its own, from any sample on; of each batch this rank's part.

    A last batch that is not full is left out.

    Args:
        num_samples: in the data set.
        batch_size: samples in a rank's part.
        seed: of the order, together with the epoch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.epoch = self.done = 0

    @property
    def step(self) -> int:
        """Samples in the batches of all ranks together."""
        return self.batch_size * world_size()

    def start(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch (from 1) and how many of its samples were trained on before."""
        self.epoch, self.done = epoch, done

    def count(self, done: int = 0) -> int:
        """Return the number of batches after the samples that are done."""
        return (self.num_samples - done) // self.step

    def __len__(self) -> int:
        return self.count(self.done)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for i in range(len(self)):
            first = self.done + i * self.step + rank() * self.batch_size
            yield order[first : first + self.batch_size]


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
        self.network = distribute(self.model, device)  # as it is called in training
        self.train_set, self.val_set = train_set, val_set
        self.folder = Path(args.output_dir)
        self.writes = rank() == 0
        self.release = args.variant == "release"
        self.dice_name = "Dice on the test volumes" if facts.selected_on == "test" else "validation Dice"
        self.amp_dtype = AMP_DTYPES[args.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.base_lr, weight_decay=args.weight_decay, fused=True
        )
        self.wld = WeightLossDynamic(math.inf if args.wld == "none" else args.wld_start_epoch, args.replaced_columns)
        self.watch = NumberWatch(
            1 if device.type == "cpu" else 50,
            args.amp == "fp16",
            self.folder / "last.pth",
            "lower --base_lr" + ("" if args.amp == "none" else " or use --amp none"),
        )
        self.signals = StopSignals()
        self.batches = EpochBatches(len(train_set), args.batch_size, args.seed)
        self.loader = self.build_loader()
        self.epoch = 0  # epochs done
        self.iteration = 0  # iterations done
        # Of the epoch that is not done yet: samples, iterations and seconds so far, and the sums of the three losses.
        self.samples = self.steps = 0
        self.seconds = 0.0
        self.totals = torch.zeros(3, device=device)
        self.total_iterations = self.count_iterations()
        self.history: list[dict[str, float]] = []
        self.best_dice = -math.inf
        self.saved_at = time.monotonic()

    def build_loader(self) -> DataLoader:
        """Return the loader of this rank's batches."""
        if not self.batches.count():
            each = f" in each of {world_size()} processes" if world_size() > 1 else ""
            raise RunError(
                f"{len(self.train_set)} training samples do not fill a batch of {self.args.batch_size}{each}: "
                "lower --batch_size"
            )
        return DataLoader(
            self.train_set,
            batch_sampler=self.batches,
            num_workers=self.args.num_workers,
            persistent_workers=self.args.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=self.signals.leave_to_the_main_process,
            generator=torch.Generator(),  # of its own, so that a loader begun again leaves the global one alone
        )

    def count_iterations(self) -> int:
        """Return the iteration at which the run ends, those done included."""
        whole_epochs = self.args.max_epochs - self.epoch - bool(self.samples)
        end = self.iteration + max(whole_epochs, 0) * self.batches.count()
        if self.samples:
            end += self.batches.count(self.samples)
        return end if self.args.max_iterations is None else min(end, self.args.max_iterations)

    def fit(self) -> None:
        """Train until the last epoch or iteration.

        Raises:
            Stopped: by a signal; the run was saved.
            RunError: a number is not finite, the memory is out, or the disk is full; ``last.pth`` is as it was saved.
        """
        if self.is_over():
            return self.log_end()
        if self.writes:
            self.lock()
            remove_temporaries(self.folder)  # of a process that was killed while it wrote
            self.write_config()
        logger.info(
            "%.2f M parameters, %d training samples, %d validation cases, %d iterations, on %s%s; run folder %s",
            count_parameters(self.model) / 1e6, len(self.train_set), len(self.val_set),
            self.total_iterations, f"{world_size()} x " if world_size() > 1 else "", self.device, self.folder,
        )  # fmt: skip
        events = self.open_events()
        try:
            with self.signals:
                while not self.is_over():
                    self.train_epoch()
                    self.stop_where_asked()
                    scores = self.validate() if self.is_due() else {}
                    self.close_epoch(scores, events)
        finally:
            self.loader = None  # and with it its workers
        self.log_end()

    def lock(self) -> None:
        """Refuse a folder that another process trains into; the lock ends with this process, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locked = open(self.folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.folder}: another process trains there; wait for it or end it") from error

    def is_over(self) -> bool:
        """Whether all iterations are done, and the epoch of the last is closed."""
        return self.iteration >= self.total_iterations and not self.samples

    def train_epoch(self) -> None:
        """Train on every batch once, or on those that are left, up to a signal."""
        self.model.train()
        self.train_set.set_epoch(self.epoch + 1)
        self.batches.start(self.epoch + 1, self.samples)
        if not self.samples:
            self.steps, self.seconds = 0, 0.0
            self.totals.zero_()
            for bank in self.model.memory_banks():
                bank.key_counts.zero_()

        left = min(len(self.batches), self.total_iterations - self.iteration)
        bar = tqdm(
            self.loader, total=left, desc=f"epoch {self.epoch + 1}", disable=None if self.writes else True, leave=False
        )
        start = time.perf_counter()
        with out_of_memory(self.smaller_steps()):
            for batch in islice(bar, left):
                losses = self.train_step(batch)
                self.totals += losses
                self.samples += self.batches.step
                self.steps += 1
                if self.release:
                    self.update_k(losses[0])
                now = time.perf_counter()
                self.seconds, start = self.seconds + now - start, now
                if largest_over_ranks(self.signals.received):
                    break
                self.save_where_due()
        self.watch.check()

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """Do one iteration and return its loss and the two sums that it is made of, (3,) on the device."""
        lr = self.learning_rate(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        image = batch["image"].to(self.device, non_blocking=True)  # (B, C, S, S)
        label = batch["label"].to(self.device, non_blocking=True)  # (B, S, S)
        losses = self.losses
        if self.args.compile and not any(bank.in_warmup for bank in self.model.memory_banks()):
            self.compiled_losses = losses = self.compiled_losses or torch.compile(self.losses, dynamic=False)

        self.optimizer.zero_grad(set_to_none=True)
        parts = self.args.accumulate
        total = torch.zeros(3, device=self.device)
        for i, part in enumerate(zip(image.chunk(parts), label.chunk(parts), strict=True), 1):
            self.let_memory_write(i == parts)
            wait = self.network.no_sync() if i < parts and world_size() > 1 else nullcontext()
            with wait:
                loss, cross_entropy, dice = losses(*part)
                self.scaler.scale(loss / parts).backward()
            total += torch.stack([loss, cross_entropy, dice]).detach() / parts
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        names = tuple(batch.get("name", ()))
        self.watch.add(Step(self.iteration, lr, names, torch.stack([total[0], norm])))
        return total

    def let_memory_write(self, allowed: bool) -> None:
        """Let the memory be written or not: of the parts of a batch the last writes, so that a step is one step."""
        for bank in self.model.memory_banks():
            bank.writable = allowed

    def losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the subset loss and the two sums that it is made of, of images (B, C, S, S) and labels (B, S, S)."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.network(image)
        return subset_losses(logits, label, self.args.ce_weight, self.args.dice_weight)

    def save_where_due(self) -> None:
        """Save in mid-epoch, by iterations or by the clock."""
        args = self.args
        if self.iteration == 1:
            logger.info("the first iteration took %.1f s; there are %d in an epoch", self.seconds, len(self.batches))
        minutes = (time.monotonic() - self.saved_at) / 60
        due = bool(args.checkpoint_minutes) and minutes >= args.checkpoint_minutes
        due |= bool(args.checkpoint_iterations) and self.iteration % args.checkpoint_iterations == 0
        if largest_over_ranks(int(due)):
            self.save_last()

    def smaller_steps(self) -> str:
        """Say what to change where a step does not fit into the memory."""
        sizes = (name for name in ("img_size", "img_size_dmwla") if name in self.model.config)
        names = ("batch_size", "accumulate", *sizes, "amp")
        now = " ".join(f"--{name} {getattr(self.args, name)}" for name in names)
        return (
            f"{now} are too much for it; raise --accumulate, which computes the same batch in more parts, lower "
            "--batch_size or the image sizes, or use --amp bf16"
        )

    def stop_where_asked(self) -> None:
        """Save and raise Stopped where a rank has received a signal."""
        number = largest_over_ranks(self.signals.received)
        if number:
            self.save_last()
            again = f"the same command with --resume auto goes on from {self.folder / 'last.pth'}"
            raise Stopped(number, f"after iteration {self.iteration}: {again}")

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
        k = self.wld.step(loss, self.epoch + 1)
        if k is not None:
            for bank in self.model.memory_banks(decoder=not self.release):
                bank.replaced_columns.copy_(k)

    def is_due(self) -> bool:
        """Whether the epoch in hand is validated: every ``--eval_interval`` and the last."""
        return (self.epoch + 1) % self.args.eval_interval == 0 or self.iteration >= self.total_iterations

    def validate(self) -> dict[str, float]:
        """Return the mean validation Dice and that of each class, of volumes at their own resolution, and the gate.

        Each rank takes its share of the volumes; in ``release``, whose memory is written then too, rank 0 takes all.
        """
        start = time.perf_counter()
        share_buffers(self.model)
        every = 1 if self.release else world_size()
        dice = {}
        too_much = f"--eval_batch_size {self.args.eval_batch_size} is too much for it; lower it"
        observed = getattr(self.model, "gate_observed", lambda: nullcontext([]))  # other networks have no gate
        with out_of_memory(too_much), observed() as gates:
            for i in range(rank(), len(self.val_set), every) if self.writes or not self.release else ():
                if self.signals.received and not self.release:
                    break
                dice[i] = case_dice(
                    self.model,
                    self.val_set[i],
                    len(self.facts.class_names) + 1,
                    self.args.img_size,
                    self.args.eval_batch_size,
                    self.device,
                    self.amp_dtype,
                )
        if self.release:  # a second validation would write the memory again, so this one is not stopped
            share_buffers(self.model)
            for bank in self.model.memory_banks():
                bank.reread()
        else:
            self.stop_where_asked()
        parts = gather_over_ranks((dice, [share for gate in gates for share in gate.mean((1, 2, 3)).tolist()]))
        dice = {i: scores for part, _ in parts for i, scores in part.items()}
        opened = [share for _, part in parts for share in part]
        mean, per_class = mean_dice([dice[i] for i in sorted(dice)])
        names = (f"val_dice_{name.replace(' ', '_')}" for name in self.facts.class_names)
        classes = dict(zip(names, per_class.tolist(), strict=True))
        return {
            "selected_on": self.facts.selected_on,
            "val_dice": mean,
            **classes,
            **({"gate": float(np.mean(opened))} if opened else {}),
            "val_seconds": time.perf_counter() - start,
        }

    def close_epoch(self, scores: dict[str, float], events) -> None:
        """Let W-LD set K, write the epoch's row and save."""
        means = self.totals / self.steps
        if not self.release:
            self.update_k(means[0])
        banks, memory = list(self.model.memory_banks()), {}
        if banks:
            memory = {
                "k": int(banks[0].replaced_columns),
                "k_decoder": int(banks[-1].replaced_columns),
                "cluster_use": np.mean([(bank.key_counts > 0).float().mean().item() for bank in banks]).item(),
            }
        row = {
            "epoch": self.epoch + 1,
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
        self.epoch += 1
        self.samples = 0
        self.history.append(row)
        if self.writes:
            self.record(row, events)
        self.save(row)

    def record(self, row: dict[str, float], events) -> None:
        """Write the epoch to the log, ``metrics.csv``, TensorBoard and ``progress.png``."""
        dice = f", {self.dice_name} {100 * row['val_dice']:.2f} %" if "val_dice" in row else ""
        k = f", K {row['k']}" if "k" in row else ""
        gate = f", gate {100 * row['gate']:.0f} % open" if "gate" in row else ""
        logger.info(
            "epoch %d/%d: loss %.4f%s%s%s, lr %.2e, %.0f s",
            self.epoch, self.args.max_epochs, row["train_loss"], dice, gate, k, row["lr"], row["train_seconds"],
        )  # fmt: skip
        gates = [1.0, *(r["gate"] for r in self.history if "gate" in r)]
        if "gate" in row and gates[-1] < GATE_SHUT <= gates[-2]:
            logger.warning(
                "the gate between the encoders is shut (%.1e): the DMW-LA encoder sees next to nothing of an image. "
                "It may open again; --gate none trains without it",
                row["gate"],
            )
        self.add_scalars(row, events)
        events.flush()
        fields = list(dict.fromkeys(name for r in self.history for name in r))
        with (
            atomic_write(self.folder / "metrics.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.history)
        if "val_dice" in row:
            save_progress(self.folder / "progress.png", self.history)

    def save(self, row: dict[str, float]) -> None:
        """Write ``best.pth`` where this epoch is the best so far, ``last.pth``, and what ``--keep`` asks for."""
        is_best = self.epoch >= self.args.select_from_epoch and row.get("val_dice", -math.inf) > self.best_dice
        if is_best:
            self.best_dice = row["val_dice"]
        self.save_last(is_best)
        if self.writes and self.args.keep:
            self.keep_epoch()

    def save_last(self, is_best: bool = False) -> None:
        """Write ``last.pth``, and ``best.pth`` before it: a run that dies between them does the epoch again."""
        self.watch.check()
        state = self.state_dict()
        if self.writes:
            if is_best:
                save_checkpoint(self.folder / "best.pth", state)
            save_checkpoint(self.folder / "last.pth", state)
        self.saved_at = time.monotonic()

    def keep_epoch(self) -> None:
        """Keep ``last.pth`` as this epoch's too, and drop all but the newest ``--keep`` epochs."""
        with atomic_write(self.folder / f"epoch_{self.epoch:04d}.pth") as temporary:
            try:
                os.link(self.folder / "last.pth", temporary)  # takes no room until last.pth is another file
            except OSError:
                shutil.copyfile(self.folder / "last.pth", temporary)
        for path in sorted(self.folder.glob("epoch_*.pth"))[: -self.args.keep]:
            path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on exactly, and to rebuild the network without flags."""
        return {
            "model": self.model.state_dict(),
            "network": self.model.config,
            "data": asdict(self.facts),
            "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
            "epoch": self.epoch,
            "iteration": self.iteration,
            "in_epoch": {"samples": self.samples, "steps": self.steps, "seconds": self.seconds, "totals": self.totals},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "wld": self.wld.state_dict(),
            "overflows": self.watch.overflows,
            "random": gather_over_ranks(self.random_state()),
            "history": self.history,
            "best_dice": self.best_dice,
            **provenance(),
        }

    def random_state(self) -> dict[str, Tensor]:
        """Return the state of this rank's generators."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args.weight_decay  # which may have been typed anew
        if state["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(state["scaler"])
        self.wld.load_state_dict(state["wld"])
        self.watch.overflows = state["overflows"]
        self.epoch, self.iteration = state["epoch"], state["iteration"]
        begun = state["in_epoch"]
        self.samples, self.steps, self.seconds = begun["samples"], begun["steps"], begun["seconds"]
        self.totals = begun["totals"].to(self.device)
        self.total_iterations = self.count_iterations()
        self.history, self.best_dice = state["history"], max(state["best_dice"], self.best_on_disk())
        if len(state["random"]) == world_size():
            own = state["random"][rank()]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], self.device)

    def best_on_disk(self) -> float:
        """Return the Dice of ``best.pth``, which may be of a later epoch than the checkpoint that is gone on from."""
        try:
            return load_checkpoint(self.folder / "best.pth")["best_dice"]
        except (RunError, KeyError):
            return -math.inf

    def write_config(self) -> None:
        """Write the merged arguments, the git revision and the versions; those of a resumed run beside the first."""
        content = {"args": vars(self.args), "data": asdict(self.facts), "ranks": world_size(), **provenance()}
        name = "config_resumed.json" if self.iteration else "config.json"
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")

    def open_events(self) -> EventFile | None:
        """Return rank 0's event file, with the epochs done so far: a resumed run has one file too."""
        if not self.writes:
            return None
        events = EventFile(self.folder / "events")
        for row in self.history:
            self.add_scalars(row, events)
        events.flush()
        return events

    def add_scalars(self, row: dict[str, float], events: EventFile) -> None:
        events.add({name: value for name, value in row.items() if name != "epoch"}, row["epoch"])

    def log_end(self) -> None:
        if self.best_dice > -math.inf:
            best = f"best {self.dice_name} {100 * self.best_dice:.2f} % in {self.folder / 'best.pth'}"
        else:
            best = f"no epoch from {self.args.select_from_epoch} on was validated, so there is no best.pth"
        logger.info("done after %d iterations: %s", self.iteration, best)
