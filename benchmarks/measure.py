"""Measure times and memory, and describe the machine, for all benchmarks."""

import platform
import re
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from datasets.files import write_text
from networks import PrototypeMemoryBank
from utils.cli import ArgumentParser
from utils.errors import RunError

Sides = Mapping[str, Callable[[], object]]
"""Name of each side of a comparison, and the function that does its work once."""


def add_network(parser: ArgumentParser) -> None:
    """Add the flags that choose the network; the defaults are the paper's."""
    parser.add_argument("--model_scale", default="small", help="scale of MaxViT: pico, nano, tiny, small or base")
    parser.add_argument("--num_classes", type=int, default=9, help="classes with background")
    parser.add_argument("--img_size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--img_size_dmwla", type=int, default=224, help="side of the DMW-LA encoder's input in pixels")


def write_flags(path: Path, flags: Sequence[str], used: bool) -> None:
    """Write the flags of a run to ``path``; if the run has begun (``used``), raise RunError if they have changed."""
    text = shlex.join(flags)
    before = path.read_text(encoding="utf-8") if path.exists() else "unknown flags"
    if used and before != text:
        raise RunError(f"{path.parent} was trained with {before}, not {text}: choose another --output_dir")
    write_text(path, text)


def time_sides(sides: Sides, repeats: int = 5, warmup: int = 1, device: str | torch.device = "cpu") -> dict[str, float]:
    """Return the median seconds of each side.

    The sides run in turn, so that other work on the machine slows all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        for name, call in sides.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(call: Callable[[], object]) -> int:
    """Return the peak of PyTorch's CPU memory during a call, in bytes, above what it held before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    held = peak = 0
    allocations = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has finished its work; do nothing for a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def past_warm_up(module: nn.Module) -> None:
    """End the warm-up of all memory banks of a network or block, and fill them with random columns."""
    for bank in (m for m in module.modules() if isinstance(m, PrototypeMemoryBank)):
        bank.warmup_counter.fill_(bank.sampling_steps)
        bank.pool.normal_()
        bank.prototypes.copy_(bank.pool.mean(1))
        bank.reread()


def machine(device: str | torch.device = "cpu") -> str:
    """Return one line: processor with threads or GPU, versions of PyTorch and Python, date."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE)):
        name = found[1]
    name += f", {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}; PyTorch {torch.__version__}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"
