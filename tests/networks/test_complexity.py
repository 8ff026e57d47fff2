"""Parameters and multiply-adds are those found by hand."""

import pytest
import torch
from torch import nn

from networks.complexity import count_multiply_adds, count_parameters, flop_counter


class Small(nn.Module):
    """A convolution, and attention over its pixels in the form that has a fused path in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.register_buffer("memory", torch.zeros(1000))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_parameters_and_multiply_adds_are_those_found_by_hand():
    model, pixels = Small(), 16 * 16
    assert count_parameters(model) == 8 * 3 * 9 + 4 * 8 * 8
    convolution, projections, attention = pixels * 8 * 3 * 9, 4 * pixels * 8 * 8, 2 * pixels * pixels * 8
    assert count_multiply_adds(model, 16, 3) == convolution + projections + attention


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(kind, groups):
    conv, x = kind(8, 16, 3, stride=2, groups=groups), torch.rand(2, 8, 9, 9)
    with flop_counter() as forward:
        y = conv(x)
    assert forward.get_total_flops() == 2 * (y if kind is nn.Conv2d else x).numel() * conv.weight[0].numel()
    with flop_counter() as by_weight:
        y.sum().backward()
    assert by_weight.get_total_flops() == forward.get_total_flops()
    y = conv(x.requires_grad_())
    with flop_counter() as by_both:
        y.sum().backward()
    assert by_both.get_total_flops() == 2 * forward.get_total_flops()
