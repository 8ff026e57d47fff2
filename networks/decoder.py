"""The decoder: DMW-LA at every level, and CBAM's two attentions on the skips (CBAM: Woo et al., ECCV 2018).

    d_4 = ConvBlock(DMW-LA(conv1x1(s_4)))
    u = Up(d_{i+1});  v = CA_i(u + s_i) (u + s_i);  v = SA(v) v;  d_i = ConvBlock(DMW-LA(u + v)),  i = 3, 2, 1

Departure from the release: its channel attention at the deepest level, which it never uses, is left out here.
"""

from torch import Tensor, nn

from networks.dmwla import attention_block
from networks.gates import ChannelAttention, SpatialAttention
from networks.layers import ConvBlock, conv3x3


class Decoder(nn.Module):
    """Decode four skips, from the deepest up, through DMW-LA and a ConvBlock at each level.

    widths: C_1 ... C_4, shallowest first. options: arguments of ``attention_block``.
    """

    def __init__(self, widths: tuple[int, ...], variant: str, **options):
        super().__init__()
        c1, c2, c3, c4 = widths
        self.conv1x1 = nn.Conv2d(c4, c4, 1)
        # Each list below is in the order of the forward pass, deepest level first.
        self.dmwla = nn.ModuleList(attention_block(c, variant=variant, **options) for c in (c4, c3, c2, c1))
        self.conv_blocks = nn.ModuleList(ConvBlock(c, c) for c in (c4, c3, c2, c1))
        self.ups = nn.ModuleList([UpConv(c4, c3), UpConv(c3, c2), UpConv(c2, c1)])
        self.channel_attentions = nn.ModuleList(ChannelAttention(c, variant) for c in (c3, c2, c1))
        self.spatial_attention = SpatialAttention(3, variant)  # shared by the levels

    def forward(self, skips: list[Tensor], to_write: list | None = None) -> list[Tensor]:
        """Return the maps d_4 ... d_1 from the skips s_1 ... s_4, both (B, C_i, H_i, W_i). to_write: see ``DMWLA``."""
        *shallower, deepest = skips
        d = self.conv_blocks[0](self.dmwla[0](self.conv1x1(deepest), to_write))
        outputs = [d]
        for i, skip in enumerate(reversed(shallower)):
            u = self.ups[i](d)
            v = u + skip
            v = self.channel_attentions[i](v) * v
            v = self.spatial_attention(v, i) * v
            d = self.conv_blocks[i + 1](self.dmwla[i + 1](u + v, to_write))
            outputs.append(d)
        return outputs


class UpConv(nn.Sequential):
    """Upsample by nearest neighbour, apply 3x3 convolution, BatchNorm, ReLU: (B, in, H, W) to (B, out, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Upsample(scale_factor=2), *conv3x3(in_channels, out_channels))
