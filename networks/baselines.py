"""Networks to compare with, from segmentation-models-pytorch (smp) and MONAI.

Both libraries are optional. Each network returns one logit map, so its subset loss is the plain loss of that map. The
encoders of smp start from ImageNet weights, as Sim-MPNet's does. For grey images the weights of the first convolution
are summed over the three colours. For two channels, or more than three, the weights of the colours are repeated.
MONAI's two networks start from random weights, because no weights were published for their 2D form.
"""

from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from networks.layers import NetworkError, check_choice
from networks.maxvit import SCALES, downloading, load_weights
from networks.registry import register

Weights = str | Path | None
REMEDY = (
    "connect to the Hugging Face hub, copy its cache (HF_HOME) from a machine that has the weights, "
    "or start from random weights (--pretrained none)"
)


@register("attention_unet", size_step=16)
def attention_unet(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Build an Attention U-Net (Oktay et al., MIDL 2018): a U-Net of the original widths with gates on its skips."""
    nets = _library("monai.networks.nets", "monai")
    return nets.AttentionUnet(2, in_channels, num_classes, channels=(64, 128, 256, 512, 1024), strides=(2, 2, 2, 2))


@register("swin_unetr")
def swin_unetr(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Build a Swin UNETR in two dimensions, feature size 48 as published (Hatamizadeh et al., BrainLes 2021)."""
    if img_size < 64:  # a map of one pixel cannot be normalised
        raise NetworkError(f"img_size is {img_size}, so the deepest map of swin_unetr has one pixel: use 64 or more")
    nets = _library("monai.networks.nets", "monai")
    with _NumbersOnTheCPU():
        return nets.SwinUNETR(in_channels, num_classes, feature_size=48, spatial_dims=2)


@register("maxvit_unet")
def maxvit_unet(
    num_classes: int, in_channels: int = 1, img_size: int = 256, model_scale: str = "small", pretrained: Weights = None
) -> nn.Module:
    """Build a U-Net whose encoder is Sim-MPNet's MaxViT, with the same scales and the same weight files.

    Tu et al., ECCV 2022; Ronneberger et al., MICCAI 2015.
    """
    check_choice("model_scale", model_scale, SCALES)
    encoder, hub = f"tu-{SCALES[model_scale]}", "hub" if pretrained == "hub" else None
    network = _smp("Unet", encoder, num_classes, in_channels, img_size, hub)
    if pretrained not in (None, "hub"):
        load_weights(network.encoder.model, pretrained, model_scale)
    return network


def _smp(
    architecture: str, encoder: str,
    num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None,
) -> nn.Module:  # fmt: skip
    """Return an smp network whose encoder starts from random weights, or from weights that smp downloads (hub)."""
    if pretrained not in (None, "hub"):
        raise NetworkError(
            f"pretrained is {pretrained}; this network accepts hub (its library downloads ImageNet weights) or none"
        )
    smp = _library("segmentation_models_pytorch", "segmentation-models-pytorch")
    options = {"in_channels": in_channels, "classes": num_classes, "encoder_weights": None}
    of_timm = encoder.startswith("tu-")
    if of_timm:  # timm's encoders are built for one size, and accept only True for weights
        options["img_size"] = img_size
    if pretrained == "hub":
        options["encoder_weights"] = True if of_timm else "imagenet"
    with downloading(encoder.removeprefix("tu-"), REMEDY) if pretrained else nullcontext(), _NumbersOnTheCPU():
        return getattr(smp, architecture)(encoder, **options)


class _NumbersOnTheCPU(TorchFunctionMode):
    """Compute `linspace` on the CPU: networks read drop-path rates from it, and the meta device holds no values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _library(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise NetworkError(
            f"this network needs {package} ({error}): pip install -r requirements-baselines.txt -c constraints.txt"
        ) from error


for name, *of_smp in (
    ("unet", "Unet", "resnet34"),  # Ronneberger et al., MICCAI 2015
    ("unetplusplus", "UnetPlusPlus", "resnet34"),  # Zhou et al., DLMIA 2018
    ("segformer", "Segformer", "mit_b2"),  # Xie et al., NeurIPS 2021
    ("swin_upernet", "UPerNet", "tu-swin_tiny_patch4_window7_224"),  # Liu et al., ICCV 2021; Xiao et al., ECCV 2018
):
    register(name)(partial(_smp, *of_smp))
