"""Count parameters, multiply-adds and memory of each part of a network: ``python -m benchmarks.complexity``.

``torch.utils.flop_counter`` counts one image in evaluation, after the warm-up of the memory; two operations are one
multiply-add. The paper states 91.30 M parameters and 43.74 G multiply-adds for Synapse. ``--network`` chooses a
baseline instead.
"""

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.measure import add_network, past_warm_up
from benchmarks.plain import plain_copy
from networks import NETWORKS, NetworkError, SimMPNet, build
from networks.complexity import count_multiply_adds, count_parameters, flop_counter
from utils.cli import ArgumentParser, run_script
from utils.results import markdown

PAPER = "91.30 M parameters, 43.74 G multiply-adds"


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of the network in the order of the forward pass."""
    if not isinstance(model, SimMPNet):
        return dict(model.net.named_children())
    named = {"stem": model.stem, "MaxViT stem": model.maxvit.stem}
    named |= {f"MaxViT stage {i}": stage for i, stage in enumerate(model.maxvit.stages, 1)}
    named |= {f"DMW-LA stage {i}": stage for i, stage in enumerate(model.dmwla_encoder.stages, 1)}
    named |= {f"patch embedding {i}": m for i, m in enumerate(model.dmwla_encoder.patch_embeddings, 1)}
    named |= {"DS-GIM": model.dmwla_encoder.dsgim}
    named |= {f"decoder DMW-LA {4 - i}": m for i, m in enumerate(model.decoder.dmwla)}
    named |= {f"decoder ConvBlock {4 - i}": m for i, m in enumerate(model.decoder.conv_blocks)}
    return named | {f"decoder Up {3 - i}": m for i, m in enumerate(model.decoder.ups)}


def count(model: nn.Module, size: int, channels: int) -> list[tuple[str, int, float, int]]:
    """Return the name, parameters, multiply-adds and bytes kept for backward of each part, the rest and all.

    Counts are for one image (channels, size, size).
    """
    names = {module: name for name, module in model.named_modules()}
    x = torch.rand(1, channels, size, size)
    with flop_counter() as counter, torch.no_grad():
        model.eval()(x)
    root = f"{type(model).__name__}."
    flops = {name.removeprefix(root): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    images = 1 if isinstance(model, SimMPNet) else 2  # some baselines cannot normalise a map of one pixel
    saved = {name: kept // images for name, kept in _saved_bytes(model, x.repeat(images, 1, 1, 1)).items()}
    rows = []
    for name, module in parts(model).items():
        inside = list(module) if isinstance(module, nn.ModuleList) else [module]
        work = sum(flops.get(names[m], 0) for m in inside) / 2
        rows.append((name, count_parameters(module), work, saved[name]))
    whole = count_parameters(model), flops["Global"] / 2, saved["all"]
    rest = [total - sum(column) for total, column in zip(whole, list(zip(*rows, strict=True))[1:], strict=True)]
    others = "gates, injections, heads, attention of the decoder" if isinstance(model, SimMPNet) else "the rest"
    return [*rows, (others, *rest), ("all", *whole)]


def _saved_bytes(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Return how many bytes each part, and all, keep for backward; a storage counts once, parameters do not."""
    named = parts(model)
    saved, inside = dict.fromkeys([*named, "all"], 0), []
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)
            for name in ("all", *inside[-1:]):
                saved[name] += storage.nbytes()
        return tensor

    hooks = []
    for name, module in named.items():
        for m in module if isinstance(module, nn.ModuleList) else [module]:
            hooks.append(m.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
            hooks.append(m.register_forward_hook(lambda *_: inside.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x.requires_grad_())
    for hook in hooks:
        hook.remove()
    return saved


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="sim_mpnet", choices=NETWORKS, help="network to count")
    add_network(parser)
    parser.set_defaults(model_scale=None, img_size_dmwla=None)  # the network's own defaults, if it has these arguments
    parser.add_argument("--in_channels", type=int, default=1, help="1 (grey) or 3 (colour)")
    args = parser.parse_args()
    model = build(**{name: value for name, value in vars(args).items() if value is not None})
    past_warm_up(model)
    rows = [
        [name, f"{parameters / 1e6:.2f} M", f"{work / 1e9:.2f} G", f"{memory / 2**20:.0f} MiB"]
        for name, parameters, work, memory in count(model, args.img_size, args.in_channels)
    ]
    print(", ".join(f"{name} {value}" for name, value in model.config.items() if name in vars(args)))
    if isinstance(model, SimMPNet):
        plain_work = f"{count_multiply_adds(plain_copy(model), args.img_size, args.in_channels) / 1e9:.2f} G"
        rows.append(["all, with attention at width d as written", rows[-1][1], plain_work, "-"])
        print(f"the paper: {PAPER}")
    columns = ["", "parameters", "multiply-adds", "kept for backward, per image"]
    print(markdown(pd.DataFrame(rows, columns=columns)))


if __name__ == "__main__":
    run_script(main, NetworkError)
