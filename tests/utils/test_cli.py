"""One-line errors, exit statuses, the log, the device and the seed, as a person at a terminal meets them."""

import logging
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from datasets import DataError
from networks import NetworkError
from utils.cli import AMP_DTYPES, pick_device, run_script, seed_everything, set_precision, setup_logging
from utils.errors import RunError


@pytest.fixture(autouse=True)
def _log_as_before(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def run_and_catch(error: BaseException, capsys) -> tuple[int, str]:
    """Return exit status and stderr of a script that ends with an error."""
    with pytest.raises(SystemExit) as stop:
        run_script(mock.Mock(side_effect=error))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RunError("a.h5: found 3,\nexpected 4"), 1, "error: a.h5: found 3, expected 4\n"),
        (DataError("b.npz: no key"), 1, "error: b.npz: no key\n"),
        (NetworkError("scale giant: unknown"), 1, "error: scale giant: unknown\n"),
        (OSError(28, "No space left on device", "/x/a"), 1, "error: /x/a: No space left on device, make room"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied, check the permissions"),
        (OSError("Unable to open\nfile"), 1, "error: Unable to open file\n"),
        (RunError(), 1, "error: RunError\n"),
        (KeyboardInterrupt(), 130, "error: stopped"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_status(error, status, line, capsys):
    code, text = run_and_catch(error, capsys)
    assert code == status
    assert text.startswith(line) and text.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("a bug")])
def test_a_bug_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_and_catch(error, capsys)


def test_an_error_in_a_data_loaders_process_is_one_line_too(capsys):
    class Broken(list):
        def __getitem__(self, index):
            raise RunError("c.npz: truncated")

    with pytest.raises(RunError) as caught:
        list(torch.utils.data.DataLoader(Broken("c"), num_workers=1))
    assert run_and_catch(caught.value, capsys) == (1, "error: c.npz: truncated\n")


def test_the_log_goes_to_stderr_and_to_the_end_of_the_file(tmp_path, capsys):
    file = tmp_path / "run" / "log.txt"
    for message in ("one", "two"):
        setup_logging(file)  # a second call, as in a resumed run, doubles nothing
        logging.info(message)
    logging.warning("three")
    text = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in text] == ["one", "two", "three"]
    assert text[2] == "warning: three"
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["one", "two", "three"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_stops_the_log_file_with_one_warning_and_not_the_run(capsys):
    setup_logging("/dev/full")
    for message in ("one", "two"):
        logging.info(message)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and sum("No space left" in line for line in lines) == 1


def test_the_device_is_the_one_asked_for_or_an_error(monkeypatch, refused):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, words in (("cuda:0", "no GPU"), ("mps", "expected auto"), ("cuda:x", "expected auto")):
        refused(lambda name=name: pick_device(name), words)
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == kind
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [pick_device("cuda:1")] == chosen == [torch.device("cuda", 1)]
    refused(lambda: pick_device("cuda:2"), "2 GPUs")


@pytest.mark.usefixtures("full_precision")
def test_the_precision_is_the_one_asked_for_and_what_a_card_cannot_do_is_said(monkeypatch, refused):
    for amp in AMP_DTYPES:
        set_precision(amp, torch.device("cpu"))
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (amp == "tf32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    refused(lambda: set_precision("bf16", torch.device("cuda")), "T4 has no bfloat16: use --amp fp16")
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    set_precision("fp16", torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(kept)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_seed_gives_the_same_numbers(deterministic, monkeypatch, refused):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what is set here is undone with the test
    numbers = []
    for seed in (2222, 2222, 1):
        seed_everything(seed, deterministic)
        numbers.append((random.random(), np.random.rand(), torch.rand(1).item()))
    mode = torch.get_deterministic_debug_mode()
    seed_everything(0)
    assert numbers[0] == numbers[1] and not set(numbers[0]) & set(numbers[2])
    assert mode == (2 if deterministic else 0)  # 2: an operation that is not deterministic is an error
    refused(lambda: seed_everything(-1), "seed")
