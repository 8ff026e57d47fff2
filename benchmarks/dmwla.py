"""One DMW-LA block beside its plain transcription: ``python -m benchmarks.dmwla``.

Forward, forward with backward and memory update, and the memory that torch takes beyond the block and its input.
"""

import torch

from benchmarks.measure import add_timing, machine, markdown, past_warm_up, peak_memory, time_sides
from benchmarks.plain import plain_copy
from networks import DMWLA
from utils.cli import ArgumentParser, run_script


def step(block: DMWLA, x: torch.Tensor) -> None:
    """Do a training step's work: forward, memory update, backward to the input and the weights."""
    block.zero_grad()
    block.train()(x.requires_grad_()).sum().backward()


@torch.inference_mode()
def forward(block: DMWLA, x: torch.Tensor) -> None:
    """Do an evaluation's work."""
    block.eval()(x.detach())


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=96, help="width c")
    parser.add_argument("--feature_dim", type=int, default=256, help="memory width d")
    parser.add_argument("--num_clusters", type=int, default=9, help="clusters of the memory")
    parser.add_argument("--side", type=int, default=56, help="height and width of the map")
    parser.add_argument("--batch_size", type=int, default=4, help="maps at a time")
    add_timing(parser, repeats=9)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours = DMWLA(args.channels, args.feature_dim, args.num_clusters).to(args.device)
    past_warm_up(ours)
    plain = plain_copy(ours)
    x = torch.randn(args.batch_size, args.channels, args.side, args.side, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)

    rows = []
    for name, work in (("forward", forward), ("forward, backward, memory update", step)):
        sides = {"plain": lambda work=work: work(plain, x), "ours": lambda work=work: work(ours, x)}
        seconds = time_sides(sides, args.repeats, device=args.device)
        peaks = {side: peak_memory(call, args.device) / 2**20 for side, call in sides.items()}
        for what, unit, values in ((name, "ms", {k: 1000 * v for k, v in seconds.items()}), ("", "MiB", peaks)):
            ratio = values["plain"] / values["ours"]
            rows.append([what, f"{values['plain']:.0f} {unit}", f"{values['ours']:.0f} {unit}", f"{ratio:.1f}"])
    print(machine(args.device))
    print(f"DMW-LA, c {args.channels}, d {args.feature_dim}, {args.num_clusters} clusters of 100, {args.side} x "
          f"{args.side}, batch {args.batch_size}, float32")  # fmt: skip
    print(markdown(["", "plain", "ours", "ratio"], rows))


if __name__ == "__main__":
    run_script(main)
