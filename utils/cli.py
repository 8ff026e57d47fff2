"""What every script shares: arguments, one-line errors, the log, the device, the precision and the seed."""

import argparse
import errno
import logging
import math
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from datasets.errors import DataError, counted, one_line
from utils.errors import RunError, Stopped

REMEDIES = {
    errno.ENOSPC: ", make room on the disk or choose another folder",
    errno.EFBIG: ", make room on the disk or choose another folder",
    errno.EACCES: ", check the permissions or choose another folder",
    errno.ENOENT: ", check the path",
}

AMP_DTYPES = {"none": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The choices of ``--amp`` and their autocast type; tf32 changes float32 products instead (``set_precision``)."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the description and shows every default except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, exit status 1, defaults in its help, and no abbreviated flags."""

    def __init__(self, **options) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"(?:arguments: .*?(?=--)|choice: ')([^ =']+)", message)
        known = re.findall(r"[\w-]+", message.partition("choose from")[2]) or [*self._option_string_actions]
        if close := wrong and get_close_matches(wrong[1], known, 1):
            message += f", did you mean {close[0]}?"
        self.exit(1, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Return a ``type`` for ``add_argument`` that reads an int or float (``kind``) in [low, high]."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value

    read.__name__ = kind.__name__  # argparse's messages show this name
    return read


def run_script(main: Callable[[], object]) -> None:
    """Log to stderr, run ``main``, and turn an error that the user can correct into one line and exit status 1.

    Warnings of libraries are hidden unless ``python -W`` asks for them: this code logs what a user should know.

    The user can correct RunError, DataError, NetworkError and OSError. A run that a signal stopped exits with 128 plus
    the signal's number: 143 for SIGTERM, 130 for Ctrl-C. Any other exception is a bug and keeps its traceback.
    """
    setup_logging()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        main()
    except Stopped as stop:
        logging.warning("%s", stop)
        sys.exit(stop.status)
    except Exception as error:
        if not isinstance(error, RunError | DataError | OSError):
            from networks import NetworkError  # only here, because importing the networks takes seconds

            if not isinstance(error, NetworkError):
                raise
        logging.error(_message(error))
        traceback.clear_frames(error.__traceback__)  # lets the data loader's processes end now, without a wait at exit
        sys.exit(1)
    except KeyboardInterrupt:
        logging.error("stopped by Ctrl-C")
        sys.exit(130)


def setup_logging(file: str | Path | None = None) -> None:
    """Log to stderr and, if given, append to ``file``, whose folder is created; a second call replaces the first.

    On stderr, a warning or error begins with its level (``error: ...``), and every other line begins with the time.
    Under torchrun, the first process logs everything, and the others log only errors, as ``[rank 1] error: ...``.
    """
    rank = int(os.environ.get("RANK", 0))
    handlers: list[logging.Handler] = [_Terminal(sys.stderr)]
    if file is not None and not rank:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8", errors="backslashreplace"))  # file names may hold any bytes
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, handlers=handlers, force=True)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises RunError for another name, and if there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RunError(f"device {name!r}: expected auto, cpu, cuda or cuda:<number>")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"device {name!r}: PyTorch {torch.__version__} finds no GPU: use --device cpu")
    if device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            raise RunError(f"device {name!r}: found {counted(count, 'GPU')}, numbered from cuda:0: choose one")
        torch.cuda.set_device(device)  # for objects that are made without a device, such as an event
    return device


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch, on every device.

    If ``deterministic``, cuDNN and PyTorch use only algorithms that repeat exactly, and an operation that has none
    raises a RuntimeError; otherwise cuDNN chooses the fastest. Raises RunError for a seed that is not in [0, 2^32).
    """
    if not 0 <= seed < 2**32:
        raise RunError(f"seed {seed}: expected a number from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)  # in compiled code too
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it did not write
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
    """Set the generators to what ``random_state`` returned; the GPU's only if the state has one."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def set_precision(amp: str, device: torch.device) -> None:
    """Let a GPU round products and convolutions of float32 to TensorFloat-32 only if ``--amp`` is ``tf32``.

    Raises RunError if the GPU has no bfloat16: PyTorch would emulate it, slowly and with attention matrices in memory.
    """
    torch.set_float32_matmul_precision("high" if amp == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = amp == "tf32"
    if device.type == "cuda":
        if amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RunError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bfloat16: use --amp fp16 or none")
        # cuDNN's attention may return NaN gradients for very negative logits (pytorch#196678, cudnn-frontend#1072).
        # The other fused kernels can compute every attention of this network.
        torch.backends.cuda.enable_cudnn_sdp(False)


class _Terminal(logging.StreamHandler):
    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.WARNING:
            return logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S").format(record)
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("RANK", 0)) else ""
        return f"{rank}{record.levelname.lower()}: {one_line(record.getMessage())}"


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        # By default, logging prints a traceback for every line that cannot be written to a full disk.
        logging.getLogger().removeHandler(self)
        logging.warning("%s: %s; the log continues without this file", self.baseFilename, sys.exc_info()[1])


def _message(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        text = where + error.strerror + REMEDIES.get(error.errno, "")
    elif text.startswith("Caught ") and "Original Traceback" in text:
        # A data loader's process sends its whole traceback as the message; the error is its last line.
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return one_line(text)
