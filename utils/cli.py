"""What every script shares: arguments, one-line errors, the log, the device and the seed."""

import argparse
import errno
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from datasets.errors import printable
from utils.errors import RunError, Stopped

REMEDIES = {
    errno.ENOSPC: "make room on the disk or choose another folder",
    errno.EFBIG: "make room on the disk or choose another folder",
    errno.EDQUOT: "make room on the disk or choose another folder",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOENT: "check the path",
    errno.EEXIST: "expected a folder, check the path",
    errno.ENOTDIR: "a folder of this path is a file, check the path",
    errno.EISDIR: "expected a file, check the path",
}

AMP_DTYPES = {"none": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The choices of ``--amp`` and their autocast type. tf32 has none: it changes float32 products (``set_precision``)."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the description and shows every default except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, exit status 1, defaults in its help, and no abbreviated flags."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def positive(kind: type) -> Callable[[str], Any]:
    """Return the type of a flag whose number, an int or a float, must be above 0."""
    return _number(kind, lambda value: value > 0, "a number above 0")


def not_negative(kind: type) -> Callable[[str], Any]:
    """Return the type of a flag whose number, an int or a float, must be 0 or more."""
    return _number(kind, lambda value: value >= 0, "0 or more")


def share(text: str) -> float:
    """Read a flag's number from 0 to 1."""
    return _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")(text)


def _number(kind: type, fits: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value

    return read


def run_script(main: Callable[[], object], *errors: type[Exception]) -> None:
    """Log to stderr, run ``main``, and turn an error that the user can correct into one line and exit status 1.

    Such errors are RunError, OSError and the classes in ``errors``. A run that a signal stopped exits with 128 and its
    number: 143 for SIGTERM, 130 for Ctrl-C. Any other exception is a bug and keeps its traceback.
    """
    setup_logging()
    try:
        main()
    except (RunError, OSError, *errors) as error:
        logging.error(_message(error))
        traceback.clear_frames(error.__traceback__)  # lets the data loader's processes end now, without a wait at exit
        sys.exit(1)
    except Stopped as stop:
        logging.warning("%s", stop)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        logging.error("stopped by the keyboard")
        sys.exit(130)


def setup_logging(file: str | Path | None = None) -> None:
    """Log to stderr and, if given, to the end of ``file``, whose folder is created; a second call replaces the first.

    On stderr a warning or error is a bare ``error: ...``, and every other line has the time. Of the processes that
    torchrun starts, only the first logs more than errors.
    """
    root = logging.getLogger()
    rank = int(os.environ.get("RANK", 0))
    root.setLevel(logging.INFO)
    for handler in [h for h in root.handlers if isinstance(h, _Terminal | _LogFile)]:
        root.removeHandler(handler)
        handler.close()
    terminal = _Terminal(sys.stderr)
    lines = _LineFormatter("%(asctime)s %(message)s", "%H:%M:%S")
    if rank:
        terminal.setLevel(logging.ERROR)
        lines.prefix = f"[rank {rank}] "
    terminal.setFormatter(lines)
    root.addHandler(terminal)
    if file is not None and not rank:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        log_file = _LogFile(file, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%m-%d %H:%M:%S"))
        root.addHandler(log_file)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        RunError: the name is another one, or there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or name == "cuda:"):
        raise RunError(f"device {name!r}: expected auto, cpu, cuda or cuda:<number>")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError(f"device {name!r}: PyTorch {torch.__version__} finds no GPU: use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise RunError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs, numbered from cuda:0")
    return torch.device(name)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch, on every device.

    If ``deterministic``, cuDNN and PyTorch use only algorithms that repeat exactly, and warn if there is none;
    otherwise cuDNN chooses the fastest.

    Raises:
        RunError: the seed is not in [0, 2^32).
    """
    if not 0 <= seed < 2**32:
        raise RunError(f"seed {seed}: expected a number from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # use_deterministic_algorithms does the same and imports the compiler first, which takes seconds.
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    if deterministic:
        # cuBLAS reads this when it starts, so it has to be set before the first product on the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's generators of the CPU and of ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to what ``random_state`` returned, of a GPU only if it was one then."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def set_precision(amp: str) -> None:
    """Let the GPU multiply float32 matrices as TensorFloat-32 where ``--amp`` says ``tf32``."""
    torch.set_float32_matmul_precision("high" if amp == "tf32" else "highest")


class _LineFormatter(logging.Formatter):
    prefix = ""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return super().format(record)
        line = f"{self.prefix}{record.levelname.lower()}: {printable(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Terminal(logging.StreamHandler):
    pass


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        # logging would print a traceback for every line that a full disk refuses.
        logging.getLogger().removeHandler(self)
        logging.warning("%s: %s; the log continues without this file", self.baseFilename, error.strerror)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        remedy = REMEDIES.get(error.errno)
        return _one_line(f"{where}{error.strerror}" + (f", {remedy}" if remedy else ""))
    text = str(error) or type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:
        # A data loader's process sends its traceback as the message; the last line is the error.
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
