"""How the benchmarks measure: the sides in turn, medians and ratios, memory as torch allocates it."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from networks import PrototypeMemoryBank
from utils.cli import ArgumentParser


def add_network(parser: ArgumentParser) -> None:
    """Add what tells one network of another; the defaults are the paper's."""
    parser.add_argument("--model_scale", default="small", help="pico to base")
    parser.add_argument("--num_classes", type=int, default=9, help="with background")
    parser.add_argument("--img_size", type=int, default=256, help="side of the image")
    parser.add_argument("--img_size_dmwla", type=int, default=224, help="side of the DMW-LA encoder's image")


def add_timing(parser: ArgumentParser, repeats: int) -> None:
    """Add how often, and on how many threads of the CPU, is measured."""
    parser.add_argument("--repeats", type=int, default=repeats, help="of which the median is taken")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")


def time_sides(
    sides: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Return the median seconds of each side, called in turn, so that a busy machine slows them all alike."""
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


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Return the most bytes that torch held at once during a call beyond what it held before."""
    device = torch.device(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    held = peak = 0
    allocations = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def product_rate(n: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> float:
    """Return the operations a second of a product of n x n matrices: what a device can do."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = time_sides({"": lambda: [a @ b for _ in range(10)]}, repeats=5, warmup=2, device=device)[""] / 10
    return 2 * n**3 / seconds


def synchronize(device: str | torch.device) -> None:
    """Wait for the device, if it is one that works by itself."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def past_warm_up(module: nn.Module) -> None:
    """Put the memory of a network or a block, random columns, into use."""
    banks = [m for m in module.modules() if isinstance(m, PrototypeMemoryBank)]
    for bank in banks:
        bank.warmup_counter.fill_(bank.sampling_steps)
        bank.pool.normal_()
        bank.prototypes.copy_(bank.pool.mean(1))
        bank.reread()
    assert not any(bank.in_warmup for bank in banks)


def machine(device: str | torch.device = "cpu") -> str:
    """Return the machine in one line: processor or GPU, threads, versions, date."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    date = time.strftime("%Y-%m-%d")
    return f"{name}; PyTorch {torch.__version__}, Python {platform.python_version()}; {date}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
