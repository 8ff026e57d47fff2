"""Count parameters and multiply-adds of each part of a network: ``python -m benchmarks.complexity``.

``torch.utils.flop_counter`` counts one image in evaluation, after the warm-up of the memory; two operations are one
multiply-add. The paper states 91.30 M parameters and 43.74 G multiply-adds for Synapse. ``--network`` counts a
baseline instead.
"""

import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import add_network, past_warm_up
from benchmarks.plain import plain_copy
from networks import NETWORKS, SimMPNet, build
from utils.cli import ArgumentParser, run_script
from utils.results import markdown


def count(network: nn.Module, size: int, channels: int) -> dict[str, tuple[float, float]]:
    """Return the parameters [10^6] and multiply-adds [10^9] of each part and of ``all``, for one image in evaluation.

    The image is (channels, size, size). Buffers, such as the columns of a memory, are not counted as parameters.
    """
    # Gradients stay on: without them nn.MultiheadAttention takes a fused path that the counter does not see.
    # Not all versions of PyTorch count a CPU's fused attention, so it is computed as two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.eval()(torch.zeros(1, channels, size, size))
    flops = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}

    def work(name: str, module: nn.Module) -> float:
        if name in flops:
            return flops[name] / 2e9
        return sum(work(f"{name}.{child}", inside) for child, inside in module.named_children())  # a list of modules

    def parameters(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    root = type(network).__name__
    rows = {name: (parameters(part), work(f"{root}.{name}", part)) for name, part in network.named_children()}
    return rows | {"all": (parameters(network), flops["Global"] / 2e9)}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="sim_mpnet", choices=NETWORKS, help="network to count")
    add_network(parser)
    parser.set_defaults(model_scale=None, img_size_dmwla=None)  # the network's own defaults, if it has these arguments
    parser.add_argument("--in_channels", type=int, default=1, help="channels of an image")
    args = parser.parse_args()
    model = build(**{name: value for name, value in vars(args).items() if value is not None})
    past_warm_up(model)
    print(", ".join(f"{name} {value}" for name, value in model.config.items() if name in vars(args)))
    is_ours, image = isinstance(model, SimMPNet), (args.img_size, args.in_channels)
    rows = count(model if is_ours else model.net, *image)
    if is_ours:
        rows["all, with attention at width d as written"] = count(plain_copy(model), *image)["all"]
        rows["the paper"] = (91.30, 43.74)
    table = pd.DataFrame.from_dict(rows, "index", columns=["parameters [M]", "multiply-adds [G]"])
    print(markdown(table.rename_axis(""), ".2f", index=True))


if __name__ == "__main__":
    run_script(main)
