"""The whole network beside its plain transcription: ``python -m benchmarks.network``.

A training step (forward, subset loss, backward, AdamW, memory update) and an evaluation forward pass, in which the
plain side takes one slice at a time; its AdamW is PyTorch's default, ours the fused one that the scripts train with.
``--profile 1`` tells where our time goes, by PyTorch's operations, beside a large product of matrices.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain
from benchmarks.measure import (
    add_network,
    add_timing,
    machine,
    markdown,
    past_warm_up,
    peak_memory,
    product_rate,
    time_sides,
)
from networks import SimMPNet
from networks.complexity import flop_counter
from utils.cli import ArgumentParser, run_script
from utils.losses import subset_loss


def training_step(
    model: nn.Module, loss_of: Callable, images: Tensor, label: Tensor, fused: bool
) -> Callable[[], None]:
    """Return what does one training step; `fused` tells how AdamW computes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)

    def step() -> None:
        model.train()
        loss = loss_of(model(images), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def where_the_time_goes(call: Callable[[], object], repeats: int, count: int = 12) -> str:
    """Return a table of the operations that take longest: their time, its share of all, and their speed."""
    with flop_counter() as counter:
        call()
    flops = {str(name).removeprefix("aten."): n for name, n in counter.get_flop_counts()["Global"].items()}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call()
    milliseconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").replace("mkldnn_convolution", "convolution")  # where it is done
        milliseconds[name] += event.self_cpu_time_total / 1000 / repeats

    def row(name: str, taken: float) -> list[str]:
        speed = f"{flops[name] / taken / 1e6:.0f}" if name in flops else "-"
        return [name, f"{taken:.0f}", f"{100 * taken / milliseconds.total():.1f}", speed]

    longest = milliseconds.most_common(count)
    rest = milliseconds.total() - sum(taken for _, taken in longest)
    rows = [*(row(*pair) for pair in longest), row(f"{len(milliseconds) - len(longest)} others", rest)]
    return markdown(["", "ms", "%", "GFLOP/s"], rows)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_network(parser)
    parser.add_argument("--batch_size", type=int, default=2, help="slices at a time")
    add_timing(parser, repeats=5)
    parser.add_argument("--profile", type=int, default=0, choices=[0, 1], help="1: also where our time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = dict(num_classes=args.num_classes, img_size=args.img_size, img_size_dmwla=args.img_size_dmwla)
    ours = SimMPNet(model_scale=args.model_scale, **sizes).to(memory_format=torch.channels_last)
    past_warm_up(ours)
    plainly = plain.plain_copy(ours)
    images = torch.rand(args.batch_size, 1, args.img_size, args.img_size)
    label = torch.randint(args.num_classes, (args.batch_size, args.img_size, args.img_size))

    @torch.inference_mode()
    def slice_by_slice() -> None:
        plainly.eval()
        for image in images:
            plainly(image[None])

    @torch.inference_mode()
    def in_a_batch() -> None:
        ours.eval()(images)

    evaluation = {"plain": slice_by_slice, "ours": in_a_batch}
    training = {
        "plain": training_step(plainly, plain.subset_loss, images, label, fused=False),
        "ours": training_step(ours, subset_loss, images, label, fused=True),
    }
    rows = []
    for name, sides in (("evaluation forward", evaluation), ("training step", training)):
        seconds = time_sides(sides, args.repeats)
        peaks = {side: peak_memory(call) / 2**30 for side, call in sides.items()}
        for what, unit, values in ((name, "s", seconds), ("", "GiB", peaks)):
            ratio = values["plain"] / values["ours"]
            rows.append([what, f"{values['plain']:.2f} {unit}", f"{values['ours']:.2f} {unit}", f"{ratio:.1f}"])
    print(machine())
    print(f"{args.model_scale}, {args.img_size} / {args.img_size_dmwla}, batch {args.batch_size}, float32")
    print(markdown(["", "plain", "ours", "ratio"], rows))
    if args.profile:
        print(f"\na product of 2048 x 2048 matrices: {product_rate(2048) / 1e9:.0f} GFLOP/s")
        for name, sides in (("evaluation forward", evaluation), ("training step", training)):
            print(f"\n{name}, ours\n\n{where_the_time_goes(sides['ours'], args.repeats)}")


if __name__ == "__main__":
    run_script(main)
