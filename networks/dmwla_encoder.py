"""The DMW-LA encoder, the paper's encoder 1 ("smaller image"): four stages at strides 4, 8, 16 and 32."""

from torch import Tensor, nn

from networks.dmwla import attention_block
from networks.dsgim import DSGIM
from networks.gates import ImageInjection
from networks.layers import resize

DEPTHS = (2, 2, 6, 2)  # DMW-LA blocks of each stage
DSGIM_STAGE = 2  # counted from 0; DS-GIM follows each block of this stage


class OverlapPatchEmbedding(nn.Module):
    """Embed overlapping patches: a strided convolution, then LayerNorm over channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride) from (B, in, H, W)."""
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


class DMWLAEncoder(nn.Module):
    """Encode an image in four stages of patch embedding and DMW-LA blocks; DS-GIM follows each block of the third.

    Args:
        widths: C_1 ... C_4.
        img_size: side s in pixels to which the gated image is resized, a multiple of 32.
        dsgim: the similarities that DS-GIM uses, or ``"none"`` for no DS-GIM.
        options: arguments of ``attention_block``.
    """

    def __init__(self, widths: tuple[int, ...], img_size: int, variant: str, dsgim: str = "both", **options):
        super().__init__()
        self.img_size = img_size
        kernels, strides, previous = (7, 3, 3, 3), (4, 2, 2, 2), (3, *widths[:-1])
        self.patch_embeddings = nn.ModuleList(map(OverlapPatchEmbedding, previous, widths, kernels, strides))
        self.stages = nn.ModuleList(
            nn.ModuleList(attention_block(width, variant=variant, **options) for _ in range(depth))
            for width, depth in zip(widths, DEPTHS, strict=True)
        )
        self.dsgim = None
        if dsgim != "none":
            self.dsgim = DSGIM(widths[DSGIM_STAGE], DEPTHS[DSGIM_STAGE], variant, dsgim)
        self.injection = nn.ModuleList(map(ImageInjection, widths))

    def forward(self, image: Tensor, to_write: list | None = None) -> list[Tensor]:
        """Return e_1 ... e_4, (B, C_i, s / 2^(i+1), s / 2^(i+1)), of an image (B, 3, S, S). to_write: see ``DMWLA``."""
        features, outputs = resize(image, self.img_size), []
        for i, (embedding, blocks) in enumerate(zip(self.patch_embeddings, self.stages, strict=True)):
            features = embedding(features)
            for position, block in enumerate(blocks):
                features = block(features, to_write)
                if i == DSGIM_STAGE and self.dsgim is not None:
                    features = self.dsgim(features, position)
            features = self.injection[i](features, image)
            outputs.append(features)
        return outputs
