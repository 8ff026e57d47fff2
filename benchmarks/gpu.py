"""Measure training and evaluation on the GPU of this machine: ``python -m benchmarks.gpu``.

It times a training step (forward, subset loss, backward, AdamW, memory update) and a forward pass in evaluation, at the
paper's settings, in several forms:

- ``plain``: what the release computes, float32 with convolutions in TF32, evaluation of one slice at a time
- ``float32``, ``tf32``, ``bf16``: ours, channels-last, fused AdamW, evaluation in batches
- ``compiled``, ``graphs``: bf16 with ``torch.compile``; ``graphs`` also with CUDA graphs

Operations are counted as in ``benchmarks.complexity``, without those whose results a GPU discards, such as the
scores of other clusters. A training step counts as three forward passes. The ceiling is the measured rate of a bf16
product of 8192 x 8192 matrices (256 x 256 on a CPU). The command writes ``gpu.md`` (the table) and, for the last form
that runs, ``trace.json.gz`` (for chrome://tracing) and ``profile.txt``. If a form fails, the table shows its error, and
the other forms are still measured. A run on a CPU:

    python -m benchmarks.gpu --device cpu --forms plain float32 bf16 --model_scale pico --img_size 64 \\
        --img_size_dmwla 64 --batch_size 2 --repeats 1
"""

import gc
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain
from benchmarks.complexity import count
from benchmarks.measure import add_network, machine, past_warm_up, synchronize, time_sides
from networks import SimMPNet
from utils.cli import ArgumentParser, pick_device, run_script, seed_everything, set_precision
from utils.errors import RunError
from utils.losses import subset_loss
from utils.results import markdown

FORMS = ("plain", "float32", "tf32", "bf16", "compiled", "graphs")
EXACT = ("plain", "float32", "tf32")  # the others compute in bf16
COMPILE_MODES = {"compiled": "default", "graphs": "reduce-overhead"}


@dataclass
class Form:
    """One way to run the network. args: the flags of ``add_network``, and ``batch_size``."""

    name: str
    args: Namespace
    device: torch.device

    def network(self) -> SimMPNet:
        """Return the network in training mode, after its warm-up."""
        torch.manual_seed(0)
        set_precision(self.name, self.device)
        torch.backends.cudnn.allow_tf32 |= self.name == "plain"  # the release uses PyTorch's default
        a = self.args
        model = SimMPNet(a.num_classes, img_size=a.img_size, img_size_dmwla=a.img_size_dmwla, model_scale=a.model_scale)
        past_warm_up(model)
        model = model.to(self.device, memory_format=torch.channels_last)
        return (plain.plain_copy(model) if self.name == "plain" else model).train()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return random images (B, 1, S, S) and a random label (B, S, S) on the device."""
        shape = self.args.batch_size, self.args.img_size, self.args.img_size
        images = torch.rand(shape, device=self.device)[:, None]
        return images, torch.randint(self.args.num_classes, shape, device=self.device)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.name not in EXACT)

    def compiled(self, function: Callable) -> Callable:
        """Return a network or function, compiled if the form compiles."""
        mode = COMPILE_MODES.get(self.name)
        return torch.compile(function, dynamic=False, mode=mode) if mode else function

    def training_step(self) -> Callable[[], None]:
        """Return a function that does one training step on a random batch."""
        model, (images, label) = self.network(), self.batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=None if self.name == "plain" else True)
        loss_of = plain.subset_loss if self.name == "plain" else subset_loss

        def loss(images: Tensor, label: Tensor) -> Tensor:
            with self.autocast():
                logits = model(images)
            return loss_of(logits, label)

        loss = self.compiled(loss)

        def step() -> None:
            value = loss(images, label)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

        return step

    def evaluation(self) -> Callable[[], None]:
        """Return a function that predicts a random batch."""
        model, (images, _) = self.compiled(self.network().eval()), self.batch()

        @torch.inference_mode()
        def predict() -> None:
            with self.autocast():
                for part in images.split(1 if self.name == "plain" else len(images)):
                    torch.stack(model(part)).float().sum(0).argmax(1)

        return predict


def measure(form: Form, forward: float, ceiling: float) -> dict[str, object]:
    """Return a form's row of the table. forward: operations per image; ceiling: operations per second."""
    row, batch_size, on_gpu = {"": form.name}, form.args.batch_size, form.device.type == "cuda"
    for name, make, passes in (("training", form.training_step, 3), ("evaluation", form.evaluation, 1)):
        call = None  # frees the network and the optimizer of the measurement before
        free_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        call = make()
        first = time_sides({"": call}, 1, 0, form.device)[""]
        seconds = time_sides({"": call}, form.args.repeats, 3 if on_gpu else 0, form.device)[""]
        rate = passes * forward * batch_size / seconds
        row |= {
            f"{name} [ms]": 1000 * seconds,
            f"{name} slices per second": batch_size / seconds,
            f"{name} TFLOP/s": rate / 1e12,
            f"{name} % of the ceiling": 100 * rate / ceiling,
            f"{name} memory [GiB]": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan"),
            f"{name} first call [s]": first,
        }
    return row


def free_memory() -> None:
    """Free GPU memory that is no longer used."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def product_rate(n: int, device: torch.device) -> float:
    """Return the operations per second of a bf16 product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = time_sides({"": lambda: [a @ b for _ in range(10)]}, repeats=5, warmup=2, device=device)[""] / 10
    return 2 * n**3 / seconds


def write_profile(form: Form, folder: Path) -> None:
    """Write a trace of a training step and a table of the operations that took longest."""
    free_memory()
    step, on_gpu = form.training_step(), form.device.type == "cuda"
    for _ in range(4 if on_gpu else 1):
        step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        step()
        synchronize(form.device)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    order = f"self_{'cuda' if on_gpu else 'cpu'}_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (folder / "profile.txt").write_text(f"{form.name}, a training step\n{table}\n", encoding="utf-8")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS, help="the last form that runs is profiled")
    add_network(parser)
    parser.add_argument("--batch_size", type=int, default=20, help="slices in a batch")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; the table shows their median")
    parser.add_argument("--deterministic", type=int, default=0, choices=[0, 1], help="1: repeatable, as in training")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for the results")
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type == "cpu" and args.device == "auto":
        raise RunError("there is no GPU: for a run on the CPU give --device cpu and a small network, as --help shows")
    print(machine(device), flush=True)
    seed_everything(0, deterministic=bool(args.deterministic))
    args.output.mkdir(parents=True, exist_ok=True)

    forward = 2e9 * count(Form("float32", args, torch.device("cpu")).network(), args.img_size, 1)["all"][1]
    ceiling = product_rate(8192 if device.type == "cuda" else 256, device)
    rows, measured = [], []
    for name in args.forms:
        try:
            rows.append(measure(Form(name, args, device), forward, ceiling))
            measured.append(name)
        except Exception as error:  # the other forms are still measured
            rows.append({"": f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        print(markdown(pd.DataFrame(rows[-1:]), ".4g"), flush=True)
    settings = f"{args.model_scale}, {args.img_size} / {args.img_size_dmwla}, batch {args.batch_size}"
    settings += f", deterministic {args.deterministic}; {forward / 2e9:.1f} G multiply-adds in a forward pass per image"
    text = f"{machine(device)}\n\n{settings}; ceiling {ceiling / 1e12:.1f} TFLOP/s (bf16)\n\n"
    text += markdown(pd.DataFrame(rows), ".4g")
    (args.output / "gpu.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    if not measured:
        raise RunError(f"no form could be measured, for the reasons above and in {args.output / 'gpu.md'}")
    write_profile(Form(measured[-1], args, device), args.output)
    print(f"wrote the table, trace and profile to {args.output}")


if __name__ == "__main__":
    run_script(main)
