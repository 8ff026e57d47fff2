"""How large a network is and how much it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
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
    counter = FlopCounterMode(display=False)
    with _no_fast_path(), counter, torch.inference_mode():
        model.eval()(torch.zeros(1, in_channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from its fused form in evaluation, which the counter cannot see into."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
