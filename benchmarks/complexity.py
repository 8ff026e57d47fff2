"""Count parameters and multiply-adds of each part of a network: ``python -m benchmarks.complexity``.

``torch.utils.flop_counter`` counts one image in evaluation, after the warm-up of the memory; two operations are one
multiply-add. The paper states 91.30 M parameters and 43.74 G multiply-adds for Synapse. ``--network`` chooses a
baseline instead.
"""

import pandas as pd
import torch
from torch import nn

from benchmarks.measure import add_network, past_warm_up
from benchmarks.plain import plain_copy
from networks import NETWORKS, SimMPNet, build
from networks.complexity import count_multiply_adds, count_parameters, flop_counter
from utils.cli import ArgumentParser, run_script
from utils.results import markdown


def count(model: nn.Module, size: int, channels: int) -> dict[str, tuple[float, float]]:
    """Return the millions of parameters and 10^9 multiply-adds of each part, for one image (channels, size, size)."""
    with flop_counter() as counter, torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size))
    flops = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}

    def work(name: str, module: nn.Module) -> float:
        if name in flops:
            return flops[name] / 2
        return sum(work(f"{name}.{child}", inside) for child, inside in module.named_children())  # a list of modules

    root, parts = (type(model).__name__, model) if isinstance(model, SimMPNet) else ("Baseline.net", model.net)
    rows = {name: (count_parameters(part), work(f"{root}.{name}", part)) for name, part in parts.named_children()}
    rows["all"] = count_parameters(model), flops["Global"] / 2
    return {name: (parameters / 1e6, multiply_adds / 1e9) for name, (parameters, multiply_adds) in rows.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="sim_mpnet", choices=NETWORKS, help="network to count")
    add_network(parser)
    parser.set_defaults(model_scale=None, img_size_dmwla=None)  # the network's own defaults, if it has these arguments
    parser.add_argument("--in_channels", type=int, default=1, help="channels of an image")
    args = parser.parse_args()
    model = build(**{name: value for name, value in vars(args).items() if value is not None})
    past_warm_up(model)
    rows = count(model, args.img_size, args.in_channels)
    print(", ".join(f"{name} {value}" for name, value in model.config.items() if name in vars(args)))
    if isinstance(model, SimMPNet):
        plain_work = count_multiply_adds(plain_copy(model), args.img_size, args.in_channels) / 1e9
        rows |= {"all, with attention at width d as written": (rows["all"][0], plain_work), "the paper": (91.30, 43.74)}
    table = pd.DataFrame.from_dict(rows, "index", columns=["parameters [M]", "multiply-adds [G]"])
    print(markdown(table.rename_axis(""), ".2f", index=True))


if __name__ == "__main__":
    run_script(main)
