"""How large a network is and how much it computes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters. Buffers, such as the columns of a memory, do not count."""
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, img_size: int, in_channels: int) -> float:
    """Return the multiply-adds of one image, (1, in_channels, S, S), in evaluation. FLOPs are twice as many.

    `torch.utils.flop_counter` counts convolutions, matrix products and attention. The model runs on its own device.
    """
    device = next(model.parameters()).device
    with flop_counter() as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, in_channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of everything inside the context.

    Two corrections to torch's counter: it does not see the fused `nn.MultiheadAttention` of evaluation, and it
    multiplies the weight gradient of a grouped convolution by the number of groups.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        of_convolution = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=of_convolution) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _convolution_backward_flops(
    output: Sequence[int], x: Sequence[int], weight: Sequence[int], *options: Any, **shapes: object
) -> int:
    """Return the FLOPs of a convolution's gradients from shapes: by input and by weight, each as many as forward.

    ``options`` are those of ``aten.convolution_backward``, from its bias on.
    """
    transposed, _, _, wanted = options[4:]
    return 2 * math.prod(x if transposed else output) * math.prod(weight[1:]) * sum(wanted[:2])
