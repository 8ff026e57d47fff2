"""The training loop on a handful of drawn slices: what a run leaves behind, and that it goes on exactly."""

import csv
import gc
import json
import os
import shutil
import signal
import struct
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import NETWORKS, SimMPNet
from tests.mini import DRAWINGS, NAMES, SPLITS, MiniNet, assert_same, drawing, parse, trainer
from utils.arguments import parse_training, training_parser
from utils.checkpoint import build_network, load_checkpoint
from utils.errors import RunError, Stopped
from utils.training import Trainer


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


def stop_in_step(made: Trainer, iteration: int, number: signal.Signals) -> None:
    """Send this process a signal in the middle of an iteration."""
    step = made.train_step

    def signalled(batch):
        if made.iteration + 1 == iteration:
            os.kill(os.getpid(), number)
        return step(batch)

    made.train_step = signalled


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iteration", [1, 2, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_end(run, tmp_path, iteration, workers):
    """Within the warm-up, at its end, at the end of an epoch and of the run; the network has dropout."""
    made = trainer(tmp_path, "--num_workers", str(workers))
    stop_in_step(made, iteration, signal.SIGTERM)
    with pytest.raises(Stopped, match=f"SIGTERM after iteration {iteration}") as stopped:
        made.fit()
    assert stopped.value.status == 143
    assert load_checkpoint(tmp_path / "last.pth")["iteration"] == iteration
    resumed = trainer(tmp_path, "--resume", "auto", "--num_workers", str(workers))
    resumed.fit()
    assert_same(load_checkpoint(tmp_path / "last.pth"), load_checkpoint(run.folder / "last.pth"))
    assert_same(load_checkpoint(tmp_path / "best.pth"), load_checkpoint(run.folder / "best.pth"))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_run_stopped_while_it_validates_goes_on_to_the_same_end(tmp_path, variant):
    flags = ("--variant", variant, "--wld_start_epoch", "1", "--max_epochs", "3", "--select_from_epoch", "1")
    whole = trainer(tmp_path / "whole", *flags)
    whole.fit()
    made = trainer(tmp_path / "stopped", *flags)
    validate = made.validate

    def signalled():
        if made.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return validate()

    made.validate = signalled
    with pytest.raises(Stopped, match="SIGINT") as stopped:
        made.fit()
    # In release, validation writes the memory: it is not cut short, and the run stops with the next step.
    assert stopped.value.status == 130 and len(made.history) == (2 if variant == "release" else 1)
    trainer(tmp_path / "stopped", "--resume", "auto", *flags).fit()
    states = [load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "stopped")]
    assert_same(*states)
    assert states[0]["wld"]["previous"] is not None


def test_a_gate_that_is_shut_is_recorded_and_said_once(tmp_path, caplog):
    class Gated(MiniNet):
        """Takes the logit of its gate from a list, one for each validated volume."""

        def __init__(self, **config):
            super().__init__(**config)
            self.logits = [-9.0, -9.0, 0.0, -9.0]
            self.gate = torch.nn.Identity()

        gate_observed = SimMPNet.gate_observed

        def forward(self, x):
            logit = 9.0 if self.training else self.logits.pop(0)
            return super().forward(x * torch.sigmoid(self.gate(torch.full_like(x, logit))))

    made = trainer(tmp_path, "--max_epochs", "4", network=Gated)
    made.fit()
    assert [row["gate"] for row in made.history] == pytest.approx([1.2e-4, 1.2e-4, 0.5, 1.2e-4], rel=0.1)
    assert caplog.text.count("the gate between the encoders is shut") == 2
    with open(tmp_path / "metrics.csv") as file:
        assert [float(row["gate"]) for row in csv.DictReader(file)] == [row["gate"] for row in made.history]


def test_signals_mean_what_they_meant_after_the_run(run, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer(tmp_path).fit()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"])
def test_a_second_signal_does_not_wait_for_the_step(tmp_path, before):
    made = trainer(tmp_path)
    step = made.train_step

    def signalled(batch):
        os.kill(os.getpid(), signal.SIGINT)
        while not made.signals.received:  # two that are pending at once are one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    made.train_step = signalled
    outside = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            made.fit()
    finally:
        signal.signal(signal.SIGINT, outside)


def test_checkpoints_in_mid_epoch_come_by_iterations_and_by_minutes(tmp_path):
    def saves(*flags: str) -> list[int]:
        made = trainer(tmp_path / "".join(flags), *flags, slices=8)
        saved, save = [], made.save_last
        made.save_last = lambda *best: (saved.append(made.iteration), save(*best))
        made.fit()
        return saved

    assert saves("--checkpoint_iterations", "1") == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert saves("--checkpoint_minutes", "1e-9") == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert saves("--checkpoint_minutes", "0") == [4, 8]


def test_resume_auto_starts_a_run_where_there_is_none_and_leaves_one_that_is_over(tmp_path, caplog):
    trainer(tmp_path, "--resume", "auto").fit()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    trainer(tmp_path, "--resume", "auto").fit()
    assert "done after 4 iterations" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_damaged_last_checkpoint_is_no_dead_end(run, tmp_path):
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    (folder / "last.pth").write_bytes((folder / "last.pth").read_bytes()[:5000])
    with pytest.raises(RunError, match=r"last.pth .*--resume .*best.pth"):
        parse(folder, "--resume", "auto")
    assert trainer(folder, "--resume", str(folder / "best.pth")).epoch >= 1


def test_a_folder_that_is_trained_into_is_refused_to_another_process(tmp_path):
    made = trainer(tmp_path)
    made.lock()
    child = os.fork()
    if child == 0:
        try:
            trainer(tmp_path).lock()
        except RunError as error:
            os._exit(0 if "another process" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_newest_epochs_are_kept_and_the_folder_does_not_grow(tmp_path):
    trainer(tmp_path, "--max_epochs", "3", "--keep", "2").fit()
    assert [path.name for path in sorted(tmp_path.glob("epoch_*"))] == ["epoch_0002.pth", "epoch_0003.pth"]
    assert load_checkpoint(tmp_path / "epoch_0002.pth")["epoch"] == 2
    for epochs in range(4, 8):
        (tmp_path / f".tmp{epochs}-last.pth").write_bytes(b"cut")  # of a process that was killed
        trainer(tmp_path, "--resume", "auto", "--max_epochs", str(epochs)).fit()
    assert [path.name for path in sorted(tmp_path.glob("epoch_*"))] == ["epoch_0006.pth", "epoch_0007.pth"]
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert len(list(tmp_path.glob("config*"))) == 2
    assert not list(tmp_path.glob(".tmp*"))


def test_one_event_file_has_all_epochs_of_a_resumed_run(tmp_path):
    trainer(tmp_path, "--max_epochs", "2").fit()
    trainer(tmp_path, "--resume", "auto", "--max_epochs", "4").fit()
    (path,) = (tmp_path / "events").iterdir()
    steps = [event.step for event in read_events(path) for value in event.summary.value if value.tag == "train_loss"]
    assert steps == [1, 2, 3, 4]


def read_events(path: Path) -> list:
    """Read a file of records: length (8 bytes), its checksum (4), an event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_a_batch_in_parts_has_the_gradient_of_its_parts_and_writes_the_memory_once(tmp_path):
    made = trainer(tmp_path, "--batch_size", "4", "--accumulate", "2")
    batch = next(iter(made.loader))
    made.model.train()
    twin = trainer(tmp_path / "twin", "--batch_size", "4")
    for model in (made.model, twin.model):
        model.stem[3].p = 0.0
    image, label = batch["image"], batch["label"]
    gradient = 0
    for part in (slice(0, 2), slice(2, 4)):
        twin.model.zero_grad()
        twin.model.train()
        twin.losses(image[part], label[part])[0].backward()
        gradient = gradient + twin.model.heads[0].weight.grad / 2
    made.optimizer.step = lambda *a, **k: None
    made.train_step(batch)
    torch.testing.assert_close(made.model.heads[0].weight.grad, gradient)
    assert int(made.model.dmwla.bank.warmup_counter) == 1


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


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_by_name_and_keeps_the_last_checkpoint(tmp_path, what):
    made = trainer(tmp_path, "--checkpoint_iterations", "1")
    losses = made.losses

    def poisoned(image, label):
        loss, cross_entropy, dice = losses(image, label)
        if made.iteration + 1 == 3:
            if what == "gradient":
                loss.register_hook(lambda gradient: gradient * float("inf"))
            else:
                loss = loss * float("nan")
        return loss, cross_entropy, dice

    made.losses = poisoned
    with pytest.raises(
        RunError, match=f"iteration 3: the {what} is .* learning rate 1.00e-04, with the batch of [0-4], [0-4]"
    ):
        made.fit()
    assert load_checkpoint(tmp_path / "last.pth")["iteration"] == 2


def test_steps_may_be_looked_at_some_at_a_time_and_a_checkpoint_never_holds_a_bad_one(tmp_path):
    made = trainer(tmp_path)
    made.watch.every = 50
    step = made.train_step

    def poisoned(batch):
        if made.iteration == 2:
            made.model.heads[0].weight.data.fill_(float("nan"))
        return step(batch)

    made.train_step = poisoned
    with pytest.raises(RunError, match="iteration 3: the loss is nan"):
        made.fit()
    state = load_checkpoint(tmp_path / "last.pth")
    assert state["iteration"] == 2 and torch.isfinite(state["model"]["heads.0.weight"]).all()


def test_fp16_skips_an_overflow_counts_it_and_gives_up_where_it_is_no_accident(tmp_path):
    untouched = trainer(tmp_path / "untouched", "--amp", "fp16", "--max_epochs", "4")
    untouched.fit()  # the first scale may be too large in any case
    made = trainer(tmp_path / "once", "--amp", "fp16", "--max_epochs", "4")
    losses = made.losses

    def overflowing(when):
        def poisoned(image, label):
            loss, *others = losses(image, label)
            if when(made.iteration):
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss, *others

        return poisoned

    made.losses = overflowing(lambda iteration: iteration == 6)
    made.fit()
    overflows = [[row["overflows"] for row in run.history] for run in (untouched, made)]
    assert overflows[1] == [*overflows[0][:3], overflows[0][3] + 1]
    assert load_checkpoint(tmp_path / "once/last.pth")["overflows"] == overflows[1][-1]
    assert all(torch.isfinite(p).all() for p in made.model.parameters())

    made = trainer(tmp_path / "always", "--amp", "fp16", "--max_epochs", "20")
    losses = made.losses
    made.losses = overflowing(lambda iteration: iteration >= 6)
    with pytest.raises(RunError, match="overflowed 30 times in a row"):
        made.fit()


def test_memory_that_is_out_says_what_to_change(tmp_path):
    made = trainer(tmp_path)

    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    made.train_step = full
    with pytest.raises(RunError, match=r"2.00 GiB.*--batch_size 2 .*raise --accumulate.*image sizes.*--amp bf16"):
        made.fit()


def test_memory_of_a_long_run_stays_as_it_is(tmp_path):
    """2,000 iterations, with validations and checkpoints."""
    made = trainer(tmp_path, "--max_epochs", "20", "--keep", "2", slices=200)
    resident, close = [], made.close_epoch

    def measured(*arguments):
        close(*arguments)
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    made.close_epoch = measured
    made.fit()
    assert made.iteration == 2000
    assert resident[-1] - resident[5] < 10 * 2**20, resident


@pytest.mark.parametrize(("variant", "decoder_changes"), [("paper", True), ("release", False)])
def test_wld_sets_k_of_every_block_or_in_release_of_the_encoder(tmp_path, variant, decoder_changes):
    made = trainer(tmp_path, "--variant", variant, "--wld_start_epoch", "1", network=SimMPNet)
    made.epoch = 1
    made.update_k(torch.tensor(1.0))
    made.update_k(torch.tensor(1.2))
    ks = [int(bank.replaced_columns) for bank in made.model.memory_banks()]
    assert ks == [60] * 12 + [60 if decoder_changes else 50] * 4


def test_without_wld_k_stays_what_it_is(tmp_path):
    made = trainer(tmp_path, "--wld", "none", "--replaced_columns", "33", "--wld_start_epoch", "1", network=SimMPNet)
    for epoch, loss in enumerate((1.0, 1.2, 0.9), 1):
        made.epoch = epoch
        made.update_k(torch.tensor(loss))
    assert [int(bank.replaced_columns) for bank in made.model.memory_banks()] == [33] * 16


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
    parser = training_parser("test", NETWORKS, DRAWINGS, output_dir="elsewhere")
    args, _ = parse_training(parser, NETWORKS, SPLITS, ["--resume", str(run.folder / "last.pth")])
    assert args.batch_size == 2 and args.model_scale == "pico" and args.output_dir == run.folder


@pytest.mark.parametrize(
    "flags",
    [
        ("--columns_per_cluster", "30"),
        ("--pretrained", "hub"),
        ("--output_dir", "elsewhere"),
        ("--network", "unet"),  # of which a checkpoint as old as these says nothing
        ("--attention", "plain"),
    ],
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
        ("--accumulate", "3"),
        ("--keep", "-1"),
        ("--checkpoint_iterations", "0"),
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
