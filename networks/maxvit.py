"""The MaxViT encoder, the paper's encoder 2 ("larger image"): timm's backbone with the image injected.

MaxViT: Tu et al., ECCV 2022. The ``rmlp`` models and their ImageNet weights are timm's. A weight file is loaded
strictly here, because timm loads a file of another model with only a warning.
"""

from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from networks.errors import NetworkError
from networks.layers import ImageInjection

SCALES = {
    "pico": "maxvit_rmlp_pico_rw_256",
    "nano": "maxxvit_rmlp_nano_rw_256",
    "tiny": "maxxvit_rmlp_tiny_rw_256",
    "small": "maxxvit_rmlp_small_rw_256",  # the paper's
    "base": "maxxvitv2_rmlp_base_rw_224",
}
PRETRAINED_DIR = Path("pretrained_pth/maxvit")


class MaxViTEncoder(nn.Module):
    """Encode an image in four stages of a MaxViT at strides 4, 8, 16 and 32; inject the image after each stage.

    Args:
        scale: a key of ``SCALES``.
        img_size: side S of the image in pixels, a multiple of 32.
        pretrained: a weight file (``.pth`` or ``.safetensors`` with timm's names), ``"hub"`` or ``None``.

    Raises:
        NetworkError: the scale is unknown, or the weights are missing or do not fit.
    """

    def __init__(self, scale: str = "small", img_size: int = 256, pretrained: str | Path | None = None):
        super().__init__()
        backbone = _backbone(scale, img_size, pretrained)
        self.stem = backbone.stem
        self.stages = backbone.stages
        self.widths = tuple(stage["num_chs"] for stage in backbone.feature_info[1:])
        self.injection = ImageInjection(self.widths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return f_1 ... f_4, (B, C_i, S / 2^(i+1), S / 2^(i+1)), of an image (B, 3, S, S)."""
        features, outputs = self.stem(image), []
        for i, stage in enumerate(self.stages):
            features = self.injection(stage(features), image, i)
            outputs.append(features)
        return outputs


def scale_widths(scale: str) -> tuple[int, ...]:
    """Return the widths C_1 ... C_4 of a scale's encoder."""
    with torch.device("meta"):  # no memory, no random numbers
        stages = timm.create_model(_model_name(scale), num_classes=0).feature_info[1:]
    return tuple(stage["num_chs"] for stage in stages)


def weights_file(scale: str) -> Path:
    """Return where the ImageNet weights of ``scale`` are expected.

    Raises:
        NetworkError: the scale is unknown, or no weight file was published for it.
    """
    path = pretrained_file(scale)
    if path is None:
        raise NetworkError(
            f"no weight file was published for scale {scale}: use --pretrained hub, or --pretrained none to start "
            "from random weights"
        )
    return path


def pretrained_file(scale: str) -> Path | None:
    """Return where the ImageNet weights of ``scale`` are expected, or None if none were published."""
    url = timm.get_pretrained_cfg(_model_name(scale)).url
    return PRETRAINED_DIR / Path(urlparse(url).path).name if url else None


def _model_name(scale: str) -> str:
    if scale not in SCALES:
        raise NetworkError(f"model_scale is {scale!r}; choose one of {', '.join(SCALES)}")
    return SCALES[scale]


def _backbone(scale: str, img_size: int, pretrained: str | Path | None) -> nn.Module:
    name = _model_name(scale)
    if pretrained == "hub":
        try:
            return timm.create_model(name, pretrained=True, img_size=img_size, num_classes=0)
        except Exception as error:  # no network, no such weights, a broken cache: timm raises many kinds
            raise NetworkError(
                f"timm could not fetch the weights of {name} ({type(error).__name__}); {where_from(scale)}"
            ) from error
    weights = None if pretrained is None else read_weights(pretrained, scale)
    backbone = timm.create_model(name, pretrained=False, img_size=img_size, num_classes=0)
    if weights is not None:
        backbone.load_state_dict(weights, strict=False)  # read_weights has checked them; the norm is not used
    return backbone


def read_weights(path: str | Path, scale: str) -> dict[str, Tensor]:
    """Read a weight file of ``scale`` and return the tensors of its stem and stages, by timm's names.

    Raises:
        NetworkError: the file is missing or unreadable, or its tensors are not exactly those of the scale.
    """
    path = Path(path)
    if not path.is_file():
        raise NetworkError(f"no pretrained weights at {path}; {where_from(scale)}")
    try:
        weights = load_state_dict(str(path), weights_only=True)
        weights = {name: value for name, value in weights.items() if name.startswith(("stem.", "stages."))}
        shapes = {name: value.shape for name, value in weights.items()}
    except Exception as error:  # torch and safetensors raise many kinds of error for a file that is not theirs
        raise NetworkError(
            f"{path} is not a readable weight file ({type(error).__name__}); {where_from(scale)}"
        ) from error
    with torch.device("meta"):  # shapes only
        own = timm.create_model(_model_name(scale), num_classes=0).state_dict()
    expected = {name: value.shape for name, value in own.items() if name.startswith(("stem.", "stages."))}
    unfit = sorted(set(shapes) ^ set(expected))
    unfit += [name for name in set(shapes) & set(expected) if shapes[name] != expected[name]]
    if unfit:
        raise NetworkError(
            f"{path} does not fit {SCALES[scale]} ({len(unfit)} tensors differ, such as {unfit[0]}); "
            f"{where_from(scale)}"
        )
    return weights


def where_from(scale: str) -> str:
    """Return what a message says about getting weights of ``scale``: from where, and to which path."""
    path, config = pretrained_file(scale), timm.get_pretrained_cfg(SCALES[scale])
    otherwise = "or start from random weights (pretrained=None, --pretrained none)"
    if path is not None:
        return f"download {config.url} to {path}, {otherwise}"
    if timm.list_pretrained(f"{SCALES[scale]}*"):
        return f"download model.safetensors of {config.hf_hub_id} to {PRETRAINED_DIR}, {otherwise}"
    return f"no weights were published for scale {scale}: use another scale, {otherwise}"
