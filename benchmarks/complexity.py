"""Parameters, multiply-adds and memory of the network, stage by stage: ``python -m benchmarks.complexity``.

Counted by ``torch.utils.flop_counter`` (two operations per multiply-add) on one image in evaluation with the memory in
use, beside what the paper states for Synapse: 91.30 M parameters and 43.74 G multiply-adds. Of a baseline
(``--network``) its own parts.
"""

import torch
from torch import Tensor, nn

from benchmarks.measure import add_network, markdown, past_warm_up
from benchmarks.plain import plain_copy
from networks import NETWORKS, NetworkError, SimMPNet, build
from networks.complexity import count_multiply_adds, count_parameters, flop_counter
from utils.cli import ArgumentParser, run_script

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


def count(model: nn.Module, size: int, channels: int) -> list[list[object]]:
    """Return for each part, and for all: parameters, multiply-adds, and bytes kept for backward, of one image."""
    names = {module: name for name, module in model.named_modules()}
    x = torch.rand(1, channels, size, size)
    with flop_counter() as counter, torch.no_grad():
        model.eval()(x)
    root = f"{type(model).__name__}."
    flops = {name.removeprefix(root): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    images = 1 if isinstance(model, SimMPNet) else 2  # some baselines normalise a map of one pixel, which takes two
    saved = _saved_bytes(model, parts(model), x.repeat(images, 1, 1, 1))
    saved = {name: kept // images for name, kept in saved.items()}
    rows = []
    for name, module in parts(model).items():
        inside = list(module) if isinstance(module, nn.ModuleList) else [module]
        work = sum(flops.get(names[m], 0) for m in inside)
        rows.append([name, count_parameters(module), work / 2, saved[name]])
    rest = [count_parameters(model), flops["Global"] / 2, saved["all"]]
    for row in rows:
        rest = [a - b for a, b in zip(rest, row[1:], strict=True)]
    others = "gates, injections, heads, attention of the decoder" if isinstance(model, SimMPNet) else "the rest"
    return [*rows, [others, *rest],
            ["all", count_parameters(model), flops["Global"] / 2, saved["all"]]]  # fmt: skip


def _saved_bytes(model: nn.Module, named: dict[str, nn.Module], x: Tensor) -> dict[str, int]:
    """Return how many bytes each part keeps for its backward pass, storages counted once, parameters not at all."""
    saved, inside = dict.fromkeys([*named, "all"], 0), []
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(tensor)  # so that its address is not used again
            for name in ("all", *inside[-1:]):
                saved[name] += storage.nbytes()
        return tensor

    kept: list[Tensor] = []
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
    parser.add_argument("--network", default="sim_mpnet", choices=NETWORKS, help="what is counted")
    add_network(parser)
    parser.set_defaults(model_scale=None, img_size_dmwla=None)  # the network's own, if it takes them
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
        rows.append(["all, attention at the memory's width d, as written", rows[-1][1], plain_work, "-"])
        print(f"the paper: {PAPER}")
    print(markdown(["", "parameters", "multiply-adds", "kept for backward, per image"], rows))


if __name__ == "__main__":
    run_script(main, NetworkError)
