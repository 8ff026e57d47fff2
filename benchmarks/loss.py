"""The subset loss beside its 15 softmaxes alone: ``python -m benchmarks.loss``.

Both go forward and back to the four maps. The softmaxes of the 15 summed maps, by autograd, are what no form of this
loss can do without; the plain side computes each subset's Dice class by class.
"""

from itertools import combinations

import torch

from benchmarks import plain
from benchmarks.measure import add_timing, machine, markdown, peak_memory, time_sides
from utils.cli import ArgumentParser, run_script
from utils.losses import subset_loss


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=4, help="maps at a time")
    parser.add_argument("--num_classes", type=int, default=9, help="with background")
    parser.add_argument("--img_size", type=int, default=256, help="side of the maps")
    add_timing(parser, repeats=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = args.batch_size, args.num_classes, args.img_size, args.img_size
    maps = [torch.randn(shape, device=args.device, requires_grad=True) for _ in range(4)]
    label = torch.randint(args.num_classes, (args.batch_size, *shape[2:]), device=args.device)
    subsets = [subset for size in range(1, 5) for subset in combinations(maps, size)]

    def clear() -> None:
        for m in maps:
            m.grad = None

    def softmaxes() -> None:
        clear()
        for subset in subsets:
            p = sum(subset).softmax(1)
            p.backward(p.detach())

    def loss(loss_of) -> None:
        clear()
        loss_of(maps, label).backward()

    sides = {
        "15 softmaxes": softmaxes,
        "ours": lambda: loss(subset_loss),
        "plain": lambda: loss(plain.subset_loss),
    }
    seconds = time_sides(sides, args.repeats, device=args.device)
    rows = []
    for side, call in sides.items():
        clear()
        peak = peak_memory(call, args.device) / 2**20
        rows.append([side, f"{1000 * seconds[side]:.0f} ms", f"{seconds[side] / seconds['15 softmaxes']:.2f}",
                     f"{peak:.0f} MiB"])  # fmt: skip
    print(machine(args.device))
    print(f"forward and backward of four maps {shape}, {maps[0].nbytes / 2**20:.0f} MiB each, float32")
    print(markdown(["", "time", "beside the softmaxes", "memory"], rows))


if __name__ == "__main__":
    run_script(main)
