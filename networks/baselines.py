"""Networks to compare with, as segmentation-models-pytorch (smp) and MONAI maintain them; neither need be installed.

Each gives one logit map, for which the subset loss is the loss of that map. The encoders of smp start from ImageNet
weights unless told otherwise, as Sim-MPNet's does, and take a grey image by the sum of their first convolution's
weights over the colours. MONAI's two networks start from random weights: nobody published others.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from networks.errors import NetworkError
from networks.layers import check_choice
from networks.maxvit import SCALES, weights_file, where_from
from networks.registry import register

Weights = str | Path | None


@register("unet", default_weights=lambda options: "hub")
def unet(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """U-Net, a ResNet-34 as its encoder.

    Ronneberger et al., MICCAI 2015.
    """
    return _from_hub("Unet", "resnet34", num_classes, in_channels, pretrained)


@register("unetplusplus", default_weights=lambda options: "hub")
def unetplusplus(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """U-Net++, a ResNet-34 as its encoder.

    Zhou et al., DLMIA 2018.
    """
    return _from_hub("UnetPlusPlus", "resnet34", num_classes, in_channels, pretrained)


@register("attention_unet", size_step=16)
def attention_unet(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Attention U-Net: gates on the skips of a U-Net of the original's widths.

    Oktay et al., MIDL 2018.
    """
    nets = _library("monai.networks.nets", "monai")
    return nets.AttentionUnet(2, in_channels, num_classes, channels=(64, 128, 256, 512, 1024), strides=(2, 2, 2, 2))


@register("segformer", default_weights=lambda options: "hub")
def segformer(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """SegFormer-B2.

    Xie et al., NeurIPS 2021.
    """
    return _from_hub("Segformer", "mit_b2", num_classes, in_channels, pretrained)


@register("swin_unetr")
def swin_unetr(num_classes: int, in_channels: int = 1, img_size: int = 256) -> nn.Module:
    """Swin UNETR in two dimensions, feature size 48 as published.

    Hatamizadeh et al., BrainLes 2021.
    """
    if img_size < 64:  # one pixel cannot be normalised
        raise NetworkError(
            f"img_size is {img_size}, which leaves swin_unetr a deepest map of one pixel: take 64 or more"
        )
    nets = _library("monai.networks.nets", "monai")
    with _NumbersOnTheCPU():
        return nets.SwinUNETR(in_channels, num_classes, feature_size=48, spatial_dims=2)


@register("swin_upernet", default_weights=lambda options: "hub")
def swin_upernet(num_classes: int, in_channels: int = 1, img_size: int = 256, pretrained: Weights = None) -> nn.Module:
    """UPerNet with a Swin-T, the segmentation network of the Swin paper.

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
    """U-Net whose encoder is Sim-MPNet's MaxViT, of the same scales and from the same weight files.

    Tu et al., ECCV 2022; Ronneberger et al., MICCAI 2015.
    """
    check_choice("model_scale", model_scale, SCALES)
    options, remedy = {"img_size": img_size}, where_from(model_scale)
    if pretrained not in (None, "hub"):
        if not Path(pretrained).is_file():
            raise NetworkError(f"no pretrained weights at {pretrained}; {remedy}")
        options["pretrained_cfg_overlay"] = {"file": str(pretrained)}
    return _smp("Unet", f"tu-{SCALES[model_scale]}", num_classes, in_channels, pretrained, remedy, **options)


def _from_hub(
    architecture: str, encoder: str, num_classes: int, in_channels: int, pretrained: Weights, **encoder_options
) -> nn.Module:
    """Return a network of smp whose encoder starts from random weights or from those that smp downloads."""
    if pretrained not in (None, "hub"):
        raise NetworkError(
            f"pretrained is {pretrained}; this network takes hub (ImageNet weights that its library downloads) or none"
        )
    remedy = (
        "connect to the Hugging Face hub, copy its cache (HF_HOME) from a machine that has them, "
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
    weights = True if encoder.startswith("tu-") else "imagenet"  # timm's encoders know only yes and no
    try:
        with _NumbersOnTheCPU():
            return getattr(smp, architecture)(
                encoder,
                encoder_weights=None if pretrained is None else weights,
                in_channels=in_channels,
                classes=num_classes,
                **encoder_options,
            )
    except Exception as error:  # no network, no such weights, a broken cache or file: the libraries raise many kinds
        if pretrained is None:
            raise
        raise NetworkError(
            f"the weights ({pretrained}) of {encoder.removeprefix('tu-')} could not be had or do not fit "
            f"({type(error).__name__}); {remedy}"
        ) from error


class _NumbersOnTheCPU(TorchFunctionMode):
    """Lets a network be built on the meta device, to learn its shapes, though it reads the rates of its drop path."""

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
