"""The MaxViT encoder, the paper's encoder 2 ("larger image"): timm's backbone with the image injected.

MaxViT: Tu et al., ECCV 2022. The ``rmlp`` models and their ImageNet weights are timm's. A weight file is loaded
strictly here, because timm loads a file of another model with only a warning.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from networks.gates import ImageInjection
from networks.layers import NetworkError

SCALES = {
    "pico": "maxvit_rmlp_pico_rw_256",
    "nano": "maxxvit_rmlp_nano_rw_256",
    "tiny": "maxxvit_rmlp_tiny_rw_256",
    "small": "maxxvit_rmlp_small_rw_256",  # the paper's scale
    "base": "maxxvitv2_rmlp_base_rw_224",
}
PRETRAINED_DIR = Path("pretrained_pth/maxvit")
PARTS = ("stem.", "stages.")  # parts of the network that a weight file must fill
STEM = "stem.conv1.weight"


class MaxViTEncoder(nn.Module):
    """Encode an image in four stages of a MaxViT at strides 4, 8, 16 and 32; inject the image after each stage.

    Args:
        scale: a key of ``SCALES``.
        img_size: side S of the image in pixels, a multiple of 32.
        pretrained: a weight file (``.pth`` or ``.safetensors`` with timm's names), ``"hub"`` or ``None``.

    Raises NetworkError: the weights are missing or do not fit.
    """

    def __init__(self, scale: str = "small", img_size: int = 256, pretrained: str | Path | None = None):
        super().__init__()
        from_hub = pretrained == "hub"
        with downloading(SCALES[scale], where_from(scale)) if from_hub else nullcontext():
            backbone = timm.create_model(SCALES[scale], pretrained=from_hub, img_size=img_size, num_classes=0)
        if pretrained not in (None, "hub"):
            load_weights(backbone, pretrained, scale)
        self.stem = backbone.stem
        self.stages = backbone.stages
        self.widths = tuple(stage["num_chs"] for stage in backbone.feature_info[1:])
        self.injection = nn.ModuleList(map(ImageInjection, self.widths))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return f_1 ... f_4, (B, C_i, S / 2^(i+1), S / 2^(i+1)), of an image (B, 3, S, S)."""
        features, outputs = self.stem(image), []
        for i, stage in enumerate(self.stages):
            features = self.injection[i](stage(features), image)
            outputs.append(features)
        return outputs


def scale_widths(scale: str) -> tuple[int, ...]:
    """Return the widths C_1 ... C_4 of a scale's encoder."""
    with torch.device("meta"):  # no memory, no random numbers
        return MaxViTEncoder(scale).widths


def weights_file(scale: str) -> Path:
    """Return the path of the ImageNet weights of ``scale``; raise a NetworkError if the scale has no default file."""
    url = timm.get_pretrained_cfg(SCALES[scale]).url
    if not url:
        raise NetworkError(f"scale {scale} has no default weight file: {where_from(scale)}")
    return PRETRAINED_DIR / Path(urlparse(url).path).name


def where_from(scale: str) -> str:
    """Return the part of an error message that explains how to get the weights of ``scale``."""
    config, otherwise = timm.get_pretrained_cfg(SCALES[scale]), "or start from random weights (--pretrained none)"
    if config.url:
        return f"download {config.url} to {weights_file(scale)}, {otherwise}"
    if timm.list_pretrained(f"{SCALES[scale]}*"):
        return f"use --pretrained hub, give model.safetensors of {config.hf_hub_id} with --pretrained, {otherwise}"
    return f"no weights of this scale were published; use another scale, {otherwise}"


def load_weights(backbone: nn.Module, path: str | Path, scale: str) -> None:
    """Fill stem and stages of a MaxViT of ``scale`` from a weight file.

    As in timm, the stem's weights are summed over the colours for grey images, and repeated for 2, 4, ... channels.

    Raises NetworkError: the file is missing or unreadable, or its tensors are not exactly those of the scale.
    """
    remedy = where_from(scale)
    if not Path(path).is_file():
        raise NetworkError(f"no pretrained weights at {path}; {remedy}")
    # In a timm model that returns its features, stages.0 is named stages_0.
    own = {name.replace("stages_", "stages."): value for name, value in backbone.state_dict().items()}
    own = {name: value for name, value in own.items() if name.startswith(PARTS)}
    try:
        weights = load_state_dict(str(path), weights_only=True)
        weights = {name: value for name, value in weights.items() if name.startswith(PARTS)}
        if STEM in weights:
            weights[STEM] = adapt_input_conv(own[STEM].shape[1], weights[STEM])
        unfit = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    except Exception as error:  # torch and safetensors raise many kinds of error for a file that is not theirs
        raise NetworkError(f"{path} is not a readable weight file ({type(error).__name__}); {remedy}") from error
    unfit += sorted(weights.keys() ^ own.keys())
    if unfit:
        differ = f"{len(unfit)} tensors differ, such as {unfit[0]}"
        raise NetworkError(f"{path} does not fit {SCALES[scale]} ({differ}); {remedy}")
    for name, value in own.items():
        value.copy_(weights[name])


@contextmanager
def downloading(weights: str, remedy: str) -> Iterator[None]:
    """Turn each error inside the context, which downloads ``weights``, into a one-line NetworkError with a remedy."""
    for name in ("timm", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they report each attempt, ten of them without a connection
    try:
        yield
    except Exception as error:  # no connection, no such weights, a broken cache: the libraries raise many kinds
        raise NetworkError(f"cannot download the weights of {weights} ({type(error).__name__}); {remedy}") from error
