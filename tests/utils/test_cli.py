"""One-line errors, exit statuses, the log, the device and the seed, as a person at a terminal meets them."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.cli import ArgumentParser, pick_device, run_script, seed_everything, setup_logging
from utils.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


class OtherRoomError(ValueError):
    pass


def run_and_catch(error: BaseException, capsys, *errors: type[Exception]) -> tuple[int, str]:
    """Exit status and stderr of a script that ends with an error."""

    def main():
        setup_logging()
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main, *errors)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def _log_as_before():
    import logging

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunError("a.h5: found 3,\nexpected 4"), "error: a.h5: found 3, expected 4\n"),
        (OtherRoomError("b.npz: no key"), "error: b.npz: no key\n"),
        (OSError(28, "No space left on device", "/x/a"), "error: /x/a: No space left on device, make room"),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied, check the permissions"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "error: /x: No such file or directory"),
        (OSError("Unable to open\nfile"), "error: Unable to open file\n"),
        (RunError(), "error: RunError\n"),
    ],
)
def test_a_users_error_is_one_line_and_status_1(error, line, capsys):
    status, text = run_and_catch(error, capsys, OtherRoomError)
    assert status == 1
    assert text.startswith(line) and text.count("\n") == 1


def test_ctrl_c_is_status_130_without_a_traceback(capsys):
    status, text = run_and_catch(KeyboardInterrupt(), capsys)
    assert status == 130
    assert text.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("a bug"), OtherRoomError("not named")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_script(main)


def test_an_error_in_a_data_loaders_worker_is_one_line_too(capsys):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise RunError("c.npz: truncated")

    with pytest.raises(RunError) as caught:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert run_and_catch(caught.value, capsys) == (1, "error: c.npz: truncated\n")


def test_a_script_without_a_log_still_says_its_error():
    code = "from utils.cli import *\ndef main(): raise RunError('here')\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: here\n")


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="train.py", description="first line\n    second line")
    p.add_argument("--base_lr", type=float, default=1e-4, help="learning rate")
    p.add_argument("--resume", help="checkpoint to go on from")
    p.add_argument("--amp", action="store_true", help="half precision")
    p.add_argument("--scale", choices=["pico", "small"], default="small", help="size")
    return p


@pytest.mark.parametrize("arguments", [["--base_lr", "x"], ["--nothing"], ["--scale", "huge"], ["--base", "1"], ["x"]])
def test_bad_arguments_are_one_line_and_status_1(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    text = capsys.readouterr().err
    assert stop.value.code == 1
    assert text.startswith("train.py: error: ") and text.count("\n") == 1


def test_subcommands_answer_in_the_same_manner(capsys):
    p = ArgumentParser(prog="prepare.py")
    p.add_subparsers(required=True, dest="what").add_parser("acdc").add_argument("--jobs", type=int)
    with pytest.raises(SystemExit) as stop:
        p.parse_args(["acdc", "--jobs", "many"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_the_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "learning rate (default: 0.0001)" in text
    assert "None" not in text and "False" not in text
    assert "first line\n    second line" in text


def test_the_log_goes_to_stderr_and_to_the_end_of_the_file(tmp_path, capsys):
    import logging

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
    import logging

    setup_logging("/dev/full")
    for message in ("one", "two"):
        logging.info(message)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert sum("No space left" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_the_device_is_the_one_asked_for(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == kind
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RunError, match="2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_an_error(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="no GPU"):
        pick_device(name)


@pytest.mark.parametrize("name", ["mps", "cuda:", "cuda:x", "cuda:-1", "0", ""])
def test_an_unknown_device_is_an_error(name):
    with pytest.raises(RunError, match="expected auto"):
        pick_device(name)


@pytest.fixture
def _deterministic_as_before():
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield
    torch.set_deterministic_debug_mode(mode)
    cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.usefixtures("_deterministic_as_before")
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_seed_gives_the_same_numbers(deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what is set here is undone with the test

    def numbers(seed):
        seed_everything(seed, deterministic)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = numbers(2222)
    assert numbers(2222) == first
    assert all(a != b for a, b in zip(numbers(1), first, strict=True))
    assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(RunError, match="seed"):
        seed_everything(seed)
