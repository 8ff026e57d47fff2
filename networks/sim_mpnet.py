"""Sim-MPNet, the similarity memory prior network for medical image segmentation.

Tang et al., "Similarity Memory Prior is All You Need for Medical Image Segmentation", ICCV 2025,
arXiv 2507.00585. The variant ``paper`` is what the paper describes. ``release`` computes what the authors' program
of December 2025 computes, so that its checkpoints give its numbers; ``docs/architecture.md`` lists the differences.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from networks.decoder import Decoder
from networks.dmwla import PrototypeMemoryBank
from networks.dmwla_encoder import DMWLAEncoder
from networks.errors import NetworkError
from networks.layers import check_variant, resize
from networks.maxvit import MaxViTEncoder

SIZE_STEP = 32  # the deepest stage has stride 32


class SimMPNet(nn.Module):
    """Two encoders, one gated by the other, a decoder, and four logit maps.

    Args:
        num_classes: classes with background.
        in_channels: 1 (grey, mapped to three channels by a learned 1x1 convolution) or 3 (colour).
        img_size: side S of the input in pixels, a multiple of 32.
        img_size_dmwla: side of the DMW-LA encoder's image, a multiple of 32.
        model_scale: ``pico``, ``nano``, ``tiny``, ``small`` (the paper's) or ``base``.
        variant: ``"paper"`` or ``"release"``.
        feature_dim: memory width d of the encoder's blocks (the paper's: 256, on ACDC 128).
        num_clusters: clusters of the encoder's blocks; ``None`` means ``num_classes``.
        pretrained: a MaxViT weight file, ``"hub"`` (timm's download), or ``None`` for random weights.
        decoder_feature_dim: memory width d of the decoder's blocks.
        decoder_num_clusters: clusters of the decoder's blocks.
        columns_per_cluster: M.
        pool_momentum: weight of a key when it is blended into a column.
        phi_k_momentum: share of phi_k that survives an update.
        replaced_columns: K before W-LD changes it.
        warmup_iterations: training steps before the memory is used.

    Raises:
        NetworkError: a scale, variant, channel count or size that there is not, or weights that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        img_size: int = 256,
        img_size_dmwla: int = 224,
        model_scale: str = "small",
        variant: str = "paper",
        feature_dim: int = 256,
        num_clusters: int | None = None,
        pretrained: str | Path | None = None,
        decoder_feature_dim: int = 128,
        decoder_num_clusters: int = 10,
        columns_per_cluster: int = 100,
        pool_momentum: float = 0.3,
        phi_k_momentum: float = 0.95,
        replaced_columns: int = 50,
        warmup_iterations: int = 2000,
    ):
        super().__init__()
        # Everything that rebuilds this network, but not the weights it started from.
        num_clusters = num_classes if num_clusters is None else num_clusters
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "pretrained")}
        check_variant(variant)
        if in_channels not in (1, 3):
            raise NetworkError(f"in_channels is {in_channels}; images have 1 (grey) or 3 (colour)")
        if num_classes < 2:
            raise NetworkError(f"num_classes is {num_classes}; it counts background, so at least 2")
        _check_size("img_size", img_size)
        _check_size("img_size_dmwla", img_size_dmwla)

        memory = dict(
            columns_per_cluster=columns_per_cluster,
            pool_momentum=pool_momentum,
            phi_k_momentum=phi_k_momentum,
            replaced_columns=replaced_columns,
            warmup_iterations=warmup_iterations,
        )
        self.stem = nn.Identity()
        if in_channels == 1:
            self.stem = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.maxvit = MaxViTEncoder(model_scale, img_size, pretrained)
        widths = self.maxvit.widths
        self.gate = nn.Conv2d(widths[-1], 1, 1)
        self.dmwla_encoder = DMWLAEncoder(
            widths,
            img_size_dmwla,
            variant,
            feature_dim=feature_dim,
            num_clusters=num_clusters,
            **memory,
        )
        self.decoder = Decoder(
            widths, variant, feature_dim=decoder_feature_dim, num_clusters=decoder_num_clusters, **memory
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in reversed(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four logit maps, deepest first, each (B, num_classes, S, S); their sum's argmax predicts.

        Args:
            x: images (B, in_channels, S, S), S = ``img_size``.
        """
        self._check_input(x)
        size = x.shape[-1]
        x = self.stem(x)  # (B, 3, S, S)
        f = self.maxvit(x)  # f_i (B, C_i, S / 2^(i+1), S / 2^(i+1))
        gate = resize(torch.sigmoid(self.gate(f[-1])), size)  # (B, 1, S, S)
        e = self.dmwla_encoder(x * gate)  # e_i (B, C_i, s / 2^(i+1), s / 2^(i+1)), s = img_size_dmwla
        skips = [e_i + resize(f_i, e_i.shape[-2:]) for e_i, f_i in zip(e, f, strict=True)]
        d = self.decoder(skips)  # d_4 ... d_1
        return [resize(head(d_i), size) for head, d_i in zip(self.heads, d, strict=True)]

    def memory_banks(self, decoder: bool = True) -> Iterator[PrototypeMemoryBank]:
        """Yield every bank, those of the encoder first; without the decoder's on request."""
        for room in (self.dmwla_encoder, self.decoder) if decoder else (self.dmwla_encoder,):
            yield from (module for module in room.modules() if isinstance(module, PrototypeMemoryBank))

    def _check_input(self, x: Tensor) -> None:
        channels, size = self.config["in_channels"], self.config["img_size"]
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
            raise NetworkError(
                f"the input has shape {tuple(x.shape)}; this network takes (B, {channels}, {size}, {size}): "
                "resize the images, or build it with another img_size or in_channels"
            )


def _check_size(name: str, size: int) -> None:
    if size <= 0 or size % SIZE_STEP:
        below = max(size // SIZE_STEP * SIZE_STEP, SIZE_STEP)
        choices = f"{below}" if size < SIZE_STEP else f"{below} or {below + SIZE_STEP}"
        raise NetworkError(f"{name} is {size}; it must be a multiple of {SIZE_STEP}: the nearest is {choices}")
