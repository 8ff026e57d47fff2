"""Networks to compare with, from segmentation-models-pytorch (smp) and MONAI.

Both libraries are optional. Each network returns one logit map, so its subset loss is the plain loss of that map. The
encoders of smp start from ImageNet weights, as Sim-MPNet's does; for grey images the weights of the first convolution
are summed over the three colours. MONAI's two networks start from random weights: no others were published.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from networks.errors import NetworkError
from networks.layers import check_choice
from networks.maxvit import SCALES, read_weights, weights_file, where_from
from networks.registry import register

Weights = str | Path | None


@register("unet", default_weights=lambda options: "hub")
def unet(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """Build a U-Net with a ResNet-34 as its encoder.

    Ronneberger et al., MICCAI 2015.
    """
    return _from_hub("Unet", "resnet34", num_classes, in_channels, pretrained)


@register("unetplusplus", default_weights=lambda options: "hub")
def unetplusplus(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """Build a U-Net++ with a ResNet-34 as its encoder.

    Zhou et al., DLMIA 2018.
    """
    return _from_hub("UnetPlusPlus", "resnet34", num_classes, in_channels, pretrained)


@register("attention_unet", size_step=16)
def attention_unet(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Build an Attention U-Net: a U-Net of the original widths with gates on its skips.

    Oktay et al., MIDL 2018.
    """
    nets = _library("monai.networks.nets", "monai")
    return nets.AttentionUnet(2, in_channels, num_classes, channels=(64, 128, 256, 512, 1024), strides=(2, 2, 2, 2))


@register("segformer", default_weights=lambda options: "hub")
def segformer(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """Build a SegFormer-B2.

    Xie et al., NeurIPS 2021.
    """
    return _from_hub("Segformer", "mit_b2", num_classes, in_channels, pretrained)


@register("swin_unetr")
def swin_unetr(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Build a Swin UNETR in two dimensions, feature size 48 as published.

    Hatamizadeh et al., BrainLes 2021.
    """
    if img_size < 64:  # one pixel cannot be normalised
        raise NetworkError(
            f"img_size is {img_size}, so the deepest map of swin_unetr would be one pixel: use 64 or more"
        )
    nets = _library("monai.networks.nets", "monai")
    with _NumbersOnTheCPU():
        return nets.SwinUNETR(in_channels, num_classes, feature_size=48, spatial_dims=2)


@register("swin_upernet", default_weights=lambda options: "hub")
def swin_upernet(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """Build a UPerNet with a Swin-T, the segmentation network of the Swin paper.

    Liu et al., ICCV 2021; Xiao et al., ECCV 2018.
    """
    swin_t = "tu-swin_tiny_patch4_window7_224"
    return _from_hub("UPerNet", swin_t, num_classes, in_channels, pretrained, img_size=img_size)


@register("maxvit_unet", default_weights=lambda options: weights_file(options["model_scale"]))
def maxvit_unet(
    num_classes: int,
    in_channels: int = 1,
    img_size: int = 256,
    model_scale: str = "small",
    pretrained: Weights = None,
) -> nn.Module:
    """Build a U-Net whose encoder is Sim-MPNet's MaxViT, of the same scales and from the same weight files.

    Tu et al., ECCV 2022; Ronneberger et al., MICCAI 2015.
    """
    check_choice("model_scale", model_scale, SCALES)
    weights, hub = None, pretrained
    if pretrained not in (None, "hub"):
        weights, hub = read_weights(pretrained, model_scale), None
    encoder, remedy = f"tu-{SCALES[model_scale]}", where_from(model_scale)
    network = _smp("Unet", encoder, num_classes, in_channels, hub, remedy, img_size=img_size)
    if weights is not None:
        if in_channels == 1:
            weights["stem.conv1.weight"] = weights["stem.conv1.weight"].sum(1, keepdim=True)
        # A timm model that returns its features calls stages.0 stages_0.
        network.encoder.model.load_state_dict({n.replace("stages.", "stages_"): w for n, w in weights.items()})
    return network


def _from_hub(
    architecture: str, encoder: str, num_classes: int, in_channels: int, pretrained: Weights, **encoder_options
) -> nn.Module:
    """Return a network of smp whose encoder starts from random weights, or from those that smp downloads."""
    if pretrained not in (None, "hub"):
        raise NetworkError(
            f"pretrained is {pretrained}; this network accepts hub (its library downloads ImageNet weights) or none"
        )
    remedy = (
        "connect to the Hugging Face hub, copy its cache (HF_HOME) from a machine that has the weights, "
        "or start from random weights (pretrained=None, --pretrained none)"
    )
    return _smp(architecture, encoder, num_classes, in_channels, pretrained, remedy, **encoder_options)


def _smp(
    architecture: str,
    encoder: str,
    num_classes: int,
    in_channels: int,
    pretrained: Weights,
    remedy: str,
    **encoder_options,
) -> nn.Module:
    smp = _library("segmentation_models_pytorch", "segmentation-models-pytorch")
    weights = True if encoder.startswith("tu-") else "imagenet"  # timm's encoders accept only True
    try:
        with _NumbersOnTheCPU():
            return getattr(smp, architecture)(
                encoder,
                encoder_weights=None if pretrained is None else weights,
                in_channels=in_channels,
                classes=num_classes,
                **encoder_options,
            )
    except Exception as error:  # no connection, no such weights, a broken cache: the libraries raise many kinds
        if pretrained is None:
            raise
        raise NetworkError(
            f"cannot load weights ({pretrained}) for {encoder.removeprefix('tu-')} ({type(error).__name__}); {remedy}"
        ) from error


class _NumbersOnTheCPU(TorchFunctionMode):
    """Create `linspace` on the CPU, so that a network that reads its drop-path rates builds on the meta device."""

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
            f"this network needs {package} ({error}): pip install -r requirements-baselines.txt"
        ) from error
