"""The training loop on a few drawn slices: what a run leaves behind, and that it continues exactly."""

import json
import os
import shutil
import signal
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from networks import SimMPNet
from networks.gates import Gate
from tests.mini import MiniNet, around, assert_same, parse, trainer
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import RunError, Stopped
from utils.training import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    """A run of two epochs of two iterations each, past its warm-up."""
    made = trainer(tmp_path_factory.mktemp("run") / "whole")
    made.fit()
    return made


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run's folder, for a test to change."""
    return Path(shutil.copytree(run.run.path, tmp_path / "run"))


def test_a_run_folder_is_complete(run):
    folder = run.run.path
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["batch_size"] == 2 and config["args"]["base_lr"] == 1e-4
    assert config["versions"]["torch"] == version("torch") and "git" in config
    rows = pd.read_csv(folder / "metrics.csv")
    assert list(rows["epoch"]) == [1, 2]
    columns = "epoch iteration lr train_loss train_ce_loss train_dice_loss k k_decoder cluster_use train_seconds"
    assert list(rows) == f"{columns} selected_on val_dice val_dice_ring val_dice_disc val_seconds".split()
    assert np.isfinite(rows.drop(columns="selected_on").to_numpy()).all()
    assert {p.name for p in folder.glob("*.pth")} == {"last.pth", "best.pth"}
    assert not list(folder.rglob(".tmp*"))


@pytest.mark.parametrize(("iteration", "workers"), [(1, 0), (2, 2), (3, 0), (4, 2)])
def test_a_stopped_run_continues_to_the_same_end(run, tmp_path, iteration, workers):
    """Within the warm-up, at its end, at the end of an epoch and of the run; the network has dropout."""
    made = trainer(tmp_path, "--num_workers", str(workers))
    around(made, "train_step", lambda: made.iteration + 1 == iteration and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f"SIGTERM after iteration {iteration}") as stopped:
        made.fit()
    assert stopped.value.status == 143
    assert load_checkpoint(tmp_path / "last.pth")["iteration"] == iteration
    trainer(tmp_path, "--resume", "auto", "--num_workers", str(workers)).fit()
    for name in ("last.pth", "best.pth"):
        assert_same(load_checkpoint(tmp_path / name), load_checkpoint(run.run.path / name))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_run_stopped_while_it_validates_continues_to_the_same_end(tmp_path, variant):
    flags = ("--variant", variant, "--wld_start_epoch", "1", "--max_epochs", "3", "--select_from_epoch", "1")
    trainer(tmp_path / "whole", *flags).fit()
    made = trainer(tmp_path / "stopped", *flags)
    around(made, "validate", lambda: made.epoch == 1 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="SIGINT") as stopped:
        made.fit()
    # In release, validation writes the memory: it is not cut short, and the run stops with the next step.
    assert stopped.value.status == 130 and len(made.history) == (2 if variant == "release" else 1)
    trainer(tmp_path / "stopped", "--resume", "auto", *flags).fit()
    states = [load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "stopped")]
    assert_same(*states)
    assert states[0]["wld"]["previous"] is not None


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"])
def test_a_second_signal_ends_the_process_at_once(tmp_path, before):
    made = trainer(tmp_path)

    def signalled(batch):
        os.kill(os.getpid(), signal.SIGINT)
        while not made.signals.received:  # two pending signals are one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    made.train_step = signalled
    outside = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            made.fit()
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize(
    ("unit", "value", "saved_at"),
    [("iterations", "1", [1, 2, 3, 4, 4]), ("minutes", "1e-9", [1, 2, 3, 4, 4]), ("minutes", "0", [4])],
)
def test_checkpoints_within_an_epoch_come_by_iterations_and_by_minutes(tmp_path, unit, value, saved_at):
    made = trainer(tmp_path, f"--checkpoint_{unit}", value, "--max_epochs", "1", slices=8)
    saved, save = [], made.save
    made.save = lambda *options: (saved.append(made.iteration), save(*options))
    made.fit()
    assert saved == saved_at


def test_a_checkpoint_is_written_beside_the_training_and_holds_the_state_of_its_iteration(tmp_path, monkeypatch):
    made = trainer(tmp_path, "--max_epochs", "1", "--checkpoint_iterations", "2", slices=8)
    third, weights, written = threading.Event(), {}, {}

    def keep_weights():
        weights[made.iteration] = made.model.heads[0].weight.detach().clone()
        if made.iteration == 3:
            third.set()

    def write(path, state):
        assert third.wait(60), "the training waited for the checkpoint"
        written[state["iteration"]] = state["model"]["heads.0.weight"]
        save_checkpoint(path, state)

    monkeypatch.setattr("utils.run_folder.save_checkpoint", write)
    around(made, "train_step", after=keep_weights)
    made.fit()
    assert torch.equal(written[2], weights[2]) and torch.equal(written[4], weights[4])


@pytest.mark.parametrize(("iterations", "warnings"), [(3, 1), (4, 0)])
def test_max_iterations_ends_an_epoch_early_and_an_unused_memory_is_told(tmp_path, caplog, iterations, warnings):
    made = trainer(tmp_path, "--max_iterations", str(iterations), "--amp", "bf16")
    made.fit()
    assert (made.iteration, made.epoch) == (iterations, 2) and np.isfinite(made.history[-1]["train_loss"])
    assert caplog.text.count("before its memory is used: its warm-up has 3 steps") == warnings


def test_resume_auto_starts_a_run_and_leaves_one_that_is_over_alone(tmp_path, caplog):
    trainer(tmp_path, "--resume", "auto").fit()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    trainer(tmp_path, "--resume", "auto").fit()
    assert "done after 4 iterations" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_more_epochs_than_max_iterations_allow_are_refused_and_another_device_is_not(tmp_path, refused):
    trainer(tmp_path, "--max_iterations", "1", "--n_gpu", "0").fit()
    assert parse(tmp_path, "--resume", "auto", "--device", "cuda")[0].n_gpu == 1
    refused(lambda: parse(tmp_path, "--resume", "auto", "--max_epochs", "9"), "--max_iterations 1 ended the run")
    parse(tmp_path, "--resume", "auto", "--max_epochs", "9", "--max_iterations", "2")


def test_a_damaged_last_checkpoint_leaves_best_to_resume_from(copied, refused):
    last, best = copied / "last.pth", copied / "best.pth"
    last.write_bytes(last.read_bytes()[:5000])
    refused(lambda: parse(copied, "--resume", "auto"), "last.pth ", "--resume ", "best.pth")
    assert trainer(copied, "--resume", str(best)).epoch >= 1


def test_a_folder_in_use_is_refused_to_another_process(tmp_path):
    made = trainer(tmp_path)
    made.run.lock()
    child = os.fork()
    if child == 0:
        try:
            trainer(tmp_path).run.lock()
        except RunError as error:
            os._exit(0 if "another process" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_run_that_went_on_since_its_checkpoint_was_read_is_left_alone(tmp_path, refused):
    trainer(tmp_path, "--max_epochs", "1").fit()
    late = trainer(tmp_path, "--max_epochs", "3", "--resume", "auto")  # as a job that was submitted twice
    made = trainer(tmp_path, "--max_epochs", "2", "--resume", "auto")
    made.validate = lambda: {"val_dice": 0.0}
    made.fit()
    refused(late.fit, "last.pth was overwritten after this process read it")
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in ("best.pth", "last.pth")] == [1, 2]


def test_the_newest_epochs_are_kept_and_the_folder_does_not_grow(tmp_path):
    trainer(tmp_path, "--max_epochs", "3", "--keep", "2").fit()
    assert [path.name for path in sorted(tmp_path.glob("epoch_*"))] == ["epoch_0002.pth", "epoch_0003.pth"]
    assert load_checkpoint(tmp_path / "epoch_0002.pth")["epoch"] == 2
    for epochs in (4, 5):
        (tmp_path / f".tmp{epochs}-last.pth").write_bytes(b"cut")  # of a process that was killed
        trainer(tmp_path, "--resume", "auto", "--max_epochs", str(epochs)).fit()
    assert [path.name for path in sorted(tmp_path.glob("epoch_*"))] == ["epoch_0004.pth", "epoch_0005.pth"]
    assert len(list(tmp_path.glob("config*"))) == 2 and not list(tmp_path.glob(".tmp*"))
    (events,) = (tmp_path / "events").iterdir()
    assert events.read_bytes().count(b"train_loss") == 5


def test_a_batch_above_the_slices_is_refused_and_a_run_resumed_with_another_ends_with_the_same_epoch(copied, refused):
    refused(lambda: trainer(copied / "new", "--batch_size", "6"), "--batch_size")
    resumed = trainer(copied, "--resume", "auto", "--max_epochs", "3", "--batch_size", "1", "--weight_decay", "0.5")
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.5
    resumed.fit()
    assert resumed.epoch == 3 and resumed.iteration == 4 + 5


def test_best_is_kept_from_worse_epochs_and_from_a_kill_before_it_is_written(tmp_path):
    made = trainer(tmp_path, "--max_epochs", "3")
    scores = iter([0.3, 0.5, 0.4])
    made.validate = lambda: {"val_dice": next(scores)}
    made.fit()
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 2
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 3

    made = trainer(tmp_path, "--max_epochs", "4", "--resume", "auto")
    made.validate = lambda: {"val_dice": 0.6}
    made.run.keep_best = mock.Mock(side_effect=KeyboardInterrupt)  # last.pth is written, best.pth is not
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 4
    trainer(tmp_path, "--max_epochs", "4", "--resume", "auto").fit()
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 4


@pytest.mark.processors
def test_a_batch_in_parts_has_the_gradient_of_its_parts_and_writes_the_memory_once(tmp_path):
    made = trainer(tmp_path, "--batch_size", "4", "--accumulate", "2")
    batch = next(iter(made.loader))
    made.model.train()
    twin = trainer(tmp_path / "twin", "--batch_size", "4")
    for model in (made.model, twin.model):
        model.stem[3].p = 0.0
    gradient = 0
    for part in (slice(0, 2), slice(2, 4)):
        twin.model.zero_grad()
        twin.model.train()
        twin.losses(batch["image"][part], batch["label"][part])[0].backward()
        gradient = gradient + twin.model.heads[0].weight.grad / 2
    made.optimizer.step = lambda *a, **k: None
    made.train_step(batch)
    torch.testing.assert_close(made.model.heads[0].weight.grad, gradient)
    assert int(made.model.dmwla.bank.warmup_counter) == 1


@pytest.mark.parametrize(
    ("flags", "k", "k_decoder"),
    [("--variant paper", 60, 60), ("--variant release", 60, 50), ("--wld none --replaced_columns 33", 33, 33)],
)
def test_wld_sets_k_of_every_block_or_in_release_of_the_encoder(tmp_path, flags, k, k_decoder):
    made = trainer(tmp_path, *flags.split(), "--wld_start_epoch", "1", network=SimMPNet)
    made.epoch = 1
    made.update_k(torch.tensor(1.0))
    made.update_k(torch.tensor(1.2))
    assert [int(bank.replaced_columns) for bank in made.banks] == [k] * 12 + [k_decoder] * 4


@pytest.mark.parametrize(
    ("schedule", "middle", "end", "epochs", "warnings"),
    [("constant", 1, 1, 3, 0), ("poly", 0.5**0.9, 0, 2, 0), ("poly", 0.5**0.9, 0, 3, 1), ("cosine", 0.5, 0, 3, 1)],
)
def test_rates_follow_the_schedule_or_a_resumed_run_warns(tmp_path, caplog, schedule, middle, end, epochs, warnings):
    made = trainer(tmp_path, "--lr_schedule", schedule, "--keep", "2")
    total = made.total_iterations
    assert [made.learning_rate(i) for i in (0, total // 2, total)] == pytest.approx([1e-4, 1e-4 * middle, 1e-4 * end])
    made.fit()
    for name in ("last.pth", "best.pth"):
        (tmp_path / name).unlink()
    trainer(tmp_path, "--resume", str(tmp_path / "epoch_0001.pth"), "--max_epochs", str(epochs)).fit()
    assert caplog.text.count("iteration 2 had learning rate") == warnings


def test_a_run_resumed_with_less_to_do_closes_its_epoch(tmp_path):
    made = trainer(tmp_path, "--lr_schedule", "poly", "--checkpoint_iterations", "3")
    made.validate = lambda: (made.epoch and pytest.fail("killed")) or {}
    with pytest.raises(pytest.fail.Exception):
        made.fit()
    resumed = trainer(tmp_path, "--resume", "auto", "--max_iterations", "1")
    resumed.fit()
    assert (resumed.iteration, resumed.epoch) == (3, 2)


def test_a_gate_that_shuts_is_recorded_and_reported_once(tmp_path, caplog):
    class Gated(MiniNet):
        """Takes the logit of a gate from a list, one for each validated volume."""

        def __init__(self, **config):
            super().__init__(**config)
            self.logits = [-9.0, -9.0, 0.0, -9.0]
            self.gate, self.injection = Gate(), Gate()

        gates_observed = SimMPNet.gates_observed

        def gates(self):
            yield "gate_spatial_1", self.gate
            yield "gate_maxvit_1", self.injection

        def forward(self, x):
            self.injection(torch.full_like(x, -9.0))
            return super().forward(x * self.gate(torch.full_like(x, 9.0 if self.training else self.logits.pop(0))))

    trainer(tmp_path, "--max_epochs", "4", network=Gated).fit()
    gates = pd.read_csv(tmp_path / "metrics.csv")["gate_spatial_1"].tolist()
    assert gates == pytest.approx([1.2e-4, 1.2e-4, 0.5, 1.2e-4], rel=0.1)
    assert caplog.text.count("shut gates: gate_spatial_1; what they multiply is lost") == 2
    assert caplog.text.count("shut gates: gate_maxvit_1; the image is not injected there") == 1


def test_the_gate_between_the_encoders_learns_at_its_own_rate_and_an_older_run_resumes_at_one(tmp_path):
    made = trainer(tmp_path, network=SimMPNet, slices=2)
    (others, gate), scale = made.optimizer.param_groups, made.model.gate.lr_scale
    made.train_step(next(iter(made.loader)))
    assert scale == 1 / 16 and gate["lr"] == scale * others["lr"]
    assert sum(len(group["params"]) for group in made.optimizer.param_groups) == len(list(made.model.parameters()))
    old = torch.optim.AdamW(made.model.parameters(), fused=True).state_dict()
    made.load_state_dict(made.state_dict() | {"optimizer": old})
    made.train_step(next(iter(made.loader)))
    assert [group["lr_scale"] for group in made.optimizer.param_groups] == [1.0]


def test_compiled_steps_are_traced_once_in_the_warm_up_and_once_after_it(tmp_path, monkeypatch):
    traced_at = []
    recording = partial(torch.compile, backend=lambda graph, _: traced_at.append(made.iteration) or graph)
    monkeypatch.setattr(torch, "compile", recording)
    made = trainer(tmp_path, "--compile", "--max_epochs", "3")
    made.fit()
    assert made.iteration == 6 and set(traced_at) == {0, 3}  # --warmup_iterations 3
    torch._dynamo.reset()
