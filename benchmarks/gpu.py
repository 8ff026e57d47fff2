"""Measure training and evaluation on the GPU of this machine: ``python -m benchmarks.gpu``.

It times a training step (forward, subset loss, backward, AdamW, memory update) and a forward pass in evaluation, at the
paper's settings, in several forms:

- ``plain``: what the release computes, float32, evaluation of one slice at a time
- ``float32``, ``tf32``, ``bf16``: ours, channels-last, fused AdamW, evaluation in batches
- ``compiled``, ``graphs``: bf16 with ``torch.compile``; ``graphs`` also with CUDA graphs

``torch.utils.flop_counter`` counts the operations of our network on a CPU, without what a GPU computes in vain, such as
scores of other clusters. The ceiling is the measured rate of a bf16 product of 8192 x 8192 matrices. The command writes
``gpu.md`` (the table) and, for the last form, ``trace.json.gz`` (for chrome://tracing) and ``profile.txt``. The table
shows the error of a form that fails; the other forms run all the same. A run on a CPU:

    python -m benchmarks.gpu --device cpu --forms plain float32 bf16 --model_scale pico --img_size 64 \\
        --img_size_dmwla 64 --batch_size 2 --repeats 1
"""

import gc
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain
from benchmarks.measure import add_network, machine, past_warm_up, synchronize, time_sides
from networks import SimMPNet
from networks.complexity import flop_counter
from utils.cli import ArgumentParser, pick_device, run_script, set_precision
from utils.losses import subset_loss
from utils.results import markdown

FORMS = ("plain", "float32", "tf32", "bf16", "compiled", "graphs")


@dataclass
class Form:
    """One way to run the network."""

    name: str
    args: Namespace
    device: torch.device

    @property
    def compile_mode(self) -> str | None:
        """Return the mode of torch.compile, or None if the form does not compile."""
        return {"compiled": "default", "graphs": "reduce-overhead"}.get(self.name)

    def network(self) -> SimMPNet:
        """Return the network in training mode, after its warm-up."""
        torch.manual_seed(0)
        set_precision(self.name)
        a = self.args
        model = SimMPNet(a.num_classes, img_size=a.img_size, img_size_dmwla=a.img_size_dmwla, model_scale=a.model_scale)
        past_warm_up(model)
        model = model.to(self.device, memory_format=torch.channels_last)
        return (plain.plain_copy(model) if self.name == "plain" else model).train()

    def autocast(self):
        """Return the context of the forward pass."""
        if self.name in ("plain", "float32", "tf32"):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def training_step(self, batch_size: int) -> Callable[[], None]:
        """Return a function that does one training step on a random batch."""
        model = self.network()
        images, label = self.batch(batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.name != "plain")
        loss_of = plain.subset_loss if self.name == "plain" else subset_loss

        def losses(images: Tensor, label: Tensor) -> Tensor:
            with self.autocast():
                logits = model(images)
            return loss_of(logits, label)

        if self.compile_mode:
            losses = torch.compile(losses, dynamic=False, mode=self.compile_mode)

        def step() -> None:
            loss = losses(images, label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return step

    def evaluation(self, batch_size: int) -> Callable[[], None]:
        """Return a function that predicts a random batch."""
        model: nn.Module = self.network().eval()
        images, _ = self.batch(batch_size)
        if self.compile_mode:
            model = torch.compile(model, dynamic=False, mode=self.compile_mode)

        @torch.inference_mode()
        def predict() -> None:
            with self.autocast():
                for part in images.split(1 if self.name == "plain" else batch_size):
                    torch.stack(model(part)).float().sum(0).argmax(1)

        return predict

    def batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return random images (B, 1, S, S) and a random label (B, S, S) on the device."""
        size = self.args.img_size
        images = torch.rand(batch_size, 1, size, size, device=self.device)
        return images, torch.randint(self.args.num_classes, (batch_size, size, size), device=self.device)


def median_seconds(call: Callable[[], object], form: Form) -> tuple[float, float]:
    """Return the seconds of the first call, which compiles, and the median seconds of later calls."""
    start = time.perf_counter()
    call()
    synchronize(form.device)
    first = time.perf_counter() - start
    warmup = 3 if form.device.type == "cuda" else 0
    return first, time_sides({"": call}, form.args.repeats, warmup, form.device)[""]


def product_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second of a product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = time_sides({"": lambda: [a @ b for _ in range(10)]}, repeats=5, warmup=2, device=device)[""] / 10
    return 2 * n**3 / seconds


def largest_batch(form: Form, start: int, limit: int = 1024) -> int:
    """Return the largest batch, within a tenth, whose training step fits into the memory of the GPU."""
    fits, fails = 0, limit
    size = start
    while fails - fits > max(fits // 10, 1) and size < limit:
        free_memory()
        try:
            step = form.training_step(size)
            step()
            step()
            synchronize(form.device)
            fits = size
        except torch.OutOfMemoryError:
            fails = size
        step = None
        size = 2 * fits if fails == limit else (fits + fails) // 2
    return fits


def free_memory() -> None:
    """Free GPU memory that is no longer used."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def operations(args: Namespace) -> tuple[float, float]:
    """Return the operations per image of our training step and of our evaluation."""
    form = Form("float32", args, torch.device("cpu"))
    step, predict = form.training_step(1), form.evaluation(1)
    with flop_counter() as training:
        step()
    with flop_counter() as evaluation:
        predict()
    return float(training.get_total_flops()), float(evaluation.get_total_flops())


def write_profile(form: Form, folder: Path) -> None:
    """Write a trace of a training step and a table of the operations that took longest."""
    step, on_gpu = form.training_step(form.args.batch_size), form.device.type == "cuda"
    for _ in range(4 if on_gpu else 1):
        step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler:
        step()
        synchronize(form.device)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (folder / "profile.txt").write_text(f"{form.name}, a training step\n{table}\n", encoding="utf-8")


def measure(form: Form, flops: tuple[float, float], peak_rate: float) -> list[object]:
    """Return the row of the table for a form."""
    args, batch_size = form.args, form.args.batch_size
    cells: list[object] = [form.name]
    for make, work in ((form.training_step, flops[0]), (form.evaluation, flops[1])):
        free_memory()
        if form.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, seconds = median_seconds(make(batch_size), form)
        rate = work * batch_size / seconds
        memory = torch.cuda.max_memory_allocated() / 2**30 if form.device.type == "cuda" else float("nan")
        cells += [f"{1000 * seconds:.1f}", f"{batch_size / seconds:.1f}", f"{rate / 1e12:.2f}",
                  f"{100 * rate / peak_rate:.1f}", f"{memory:.1f}", f"{first:.0f}"]  # fmt: skip
    wanted = form.device.type == "cuda" and form.compile_mode is None and args.largest_batch
    return [*cells, largest_batch(form, batch_size) if wanted else "-"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS, help="forms; the last one is profiled")
    add_network(parser)
    parser.add_argument("--batch_size", type=int, default=20, help="slices in a batch")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; the table shows their median")
    parser.add_argument("--largest_batch", type=int, default=1, choices=[0, 1], help="1: find the largest batch")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for the results")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    args.output.mkdir(parents=True, exist_ok=True)

    flops = operations(args)
    peak_rate = product_rate(8192 if device.type == "cuda" else 256, torch.bfloat16, device)
    rows = []
    for name in args.forms:
        form = Form(name, args, device)
        try:
            rows.append(measure(form, flops, peak_rate))
        except Exception as error:  # the other forms are still measured
            rows.append([name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", *["-"] * 12])
        print(*rows[-1], flush=True)
    part = "[ms]", "slices per second", "TFLOP/s", "% of the ceiling", "memory [GiB]", "first call [s]"
    header = ["", *(f"{kind} {p}" for kind in ("training", "evaluation") for p in part), "largest batch"]
    lines = [
        machine(device),
        f"{args.model_scale}, {args.img_size} / {args.img_size_dmwla}, batch {args.batch_size}; ours per image: "
        f"{flops[0] / 2e9:.1f} G multiply-adds in a training step, {flops[1] / 2e9:.1f} G in evaluation; "
        f"ceiling {peak_rate / 1e12:.1f} TFLOP/s (bf16)",
        markdown(pd.DataFrame(rows, columns=header)),
    ]
    (args.output / "gpu.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print("\n\n".join(lines))
    free_memory()
    write_profile(Form(args.forms[-1], args, device), args.output)
    print(f"wrote the table, trace and profile to {args.output}")


if __name__ == "__main__":
    run_script(main)
