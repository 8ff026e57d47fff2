"""How large a network is and how much it computes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Give the number of parameters; buffers, such as a memory's columns, do not count."""
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, img_size: int, in_channels: int) -> float:
    """Give the multiply-adds of one image, (1, in_channels, S, S), in evaluation; FLOPs are twice as many.

    Counted by `torch.utils.flop_counter`: convolutions, matrix products and attention. The model predicts on the
    device where it is.
    """
    device = next(model.parameters()).device
    with flop_counter() as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, in_channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2


@contextmanager
def flop_counter() -> Iterator["FlopCounterMode"]:
    """Count what is computed meanwhile.

    `nn.MultiheadAttention` too, whose fused form in evaluation hides its work; and the gradient by weight of a
    convolution in groups as what it is, which torch multiplies by the groups.
    """
    from torch.utils.flop_counter import FlopCounterMode  # not where only parameters are counted: it takes a while

    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        of_convolution = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=of_convolution) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _convolution_backward_flops(
    output: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **shapes: object,
) -> int:
    """Return the FLOPs of the gradients of a convolution from shapes: by input and by weight what the forward has."""
    forward = 2 * math.prod(x if transposed else output) * math.prod(weight[1:])
    return forward * sum(wanted[:2])
