"""Every network by its name: Sim-MPNet, the baselines, and your own (``docs/adding_a_network.md``).

Training, testing and prediction use only this interface, which every network here has. ``forward`` takes images
(B, in_channels, S, S) and returns a list of logit maps (B, num_classes, S, S); the arg max of their sum is the
prediction. ``config`` holds the arguments that rebuild the network. ``memory_banks`` yields its memories, and
``gates_observed`` collects any gates. ``parameter_groups`` goes to the optimizer, ``leaves_parameters_out`` to DDP.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.layers import NetworkError, check_choice, check_images, check_input, resize
from networks.maxvit import weights_file
from networks.memory_bank import PrototypeMemoryBank
from networks.sim_mpnet import SimMPNet

DEFAULT_NETWORK = "sim_mpnet"  # built if no name is given
NETWORKS: dict[str, Callable[..., nn.Module]] = {}
"""The builder of each network, by the name in ``--network`` and in checkpoints; ``build`` calls it."""
_SIZE_STEPS: dict[str, int] = {}


def register(name: str, size_step: int = 32) -> Callable:
    """Return a decorator that registers a builder (a function or a class) as the network ``name``.

    The builder takes ``num_classes``, ``in_channels`` and ``img_size``, and ``pretrained`` if there are weights to
    start from. Each further argument needs an int, float or str as default. It becomes a flag of the training scripts;
    if a flag of that name exists, the argument shares it and its default. The builder returns a network whose forward
    returns one logit map, or a list of them, of any size.

    Args:
        name: a new name.
        size_step: the sides of an image must be multiples of this, in pixels.

    Raises NetworkError: the name is in use, or the builder lacks an argument.
    """
    if name in NETWORKS:
        raise NetworkError(f"a network {name} already exists: choose another name")

    def enter(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        parameters = inspect.signature(builder).parameters
        lacking = [needed for needed in ("num_classes", "in_channels", "img_size") if needed not in parameters]
        if lacking:
            raise NetworkError(f"the builder of network {name} lacks {', '.join(lacking)}: add these arguments")
        NETWORKS[name], _SIZE_STEPS[name] = builder, size_step
        return builder

    return enter


def build(network: str = DEFAULT_NETWORK, pretrained: str | Path | None = None, **options) -> nn.Module:
    """Build the network of this name with these arguments; ``build(**model.config)`` builds the same network again.

    pretrained: the weights to start from; None means random weights.

    Raises NetworkError: the name is unknown, its library is not installed, or an argument does not fit.
    """
    check_choice("network", network, NETWORKS)
    signature = inspect.signature(NETWORKS[network])
    if "pretrained" in signature.parameters:
        options["pretrained"] = pretrained
    elif pretrained is not None:
        raise NetworkError(f"network {network} has no pretrained weights: leave pretrained out, or set it to none")
    try:
        given = signature.bind(**options)
    except TypeError as error:
        raise NetworkError(f"network {network}: {error}") from error
    given.apply_defaults()
    config = {name: value for name, value in given.arguments.items() if name != "pretrained"}
    check_images(config["num_classes"], config["in_channels"], _SIZE_STEPS[network], img_size=config["img_size"])
    model = NETWORKS[network](*given.args, **given.kwargs)
    if not hasattr(model, "parameter_groups"):
        model = Baseline(model, config)
    model.config = {"network": network} | model.config
    return model


def default_weights(network: str, options: Mapping[str, Any]) -> str | Path | None:
    """Return the default value of ``pretrained`` for a network with these arguments.

    It is the weight file for a MaxViT, ``"hub"`` for other networks, and None for networks that take no weights.
    """
    if "pretrained" not in inspect.signature(NETWORKS[network]).parameters or options.get("encoders") == "dmwla":
        return None
    return weights_file(options["model_scale"]) if "model_scale" in options else "hub"


class Baseline(nn.Module):
    """Give another network the interface of Sim-MPNet.

    Args:
        net: maps images (B, in_channels, S, S) to a logit map (B, num_classes, h, w), or to a list of them.
        config: the arguments that rebuild the network.
    """

    def __init__(self, net: nn.Module, config: dict[str, Any]):
        super().__init__()
        self.net = net
        self.leaves_parameters_out = getattr(net, "leaves_parameters_out", False)  # see adding_a_network.md
        self.config = config

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the logit maps, each (B, num_classes, S, S), of images (B, in_channels, S, S), S = ``img_size``."""
        check_input(x, self.config["in_channels"], self.config["img_size"])
        maps = self.net(x)
        maps = list(maps) if isinstance(maps, list | tuple) else [maps]
        return [m if m.shape[-2:] == x.shape[-2:] else resize(m, x.shape[-2:]) for m in maps]

    def memory_banks(self, decoder: bool = True) -> Iterator[PrototypeMemoryBank]:
        """Yield the memory bank of every DMW-LA block in the network. ``decoder`` is ignored."""
        yield from (module for module in self.modules() if isinstance(module, PrototypeMemoryBank))

    def gates_observed(self) -> AbstractContextManager[dict[str, list[Tensor]]]:
        """Collect nothing: no gate of a baseline is observed."""
        return nullcontext({})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group with all parameters."""
        return [{"params": list(self.parameters()), "lr_scale": 1.0}]


register(DEFAULT_NETWORK)(SimMPNet)
