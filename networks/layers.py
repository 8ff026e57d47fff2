"""Checks of arguments, and small layers that both encoders and the decoder share."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = ("paper", "release", "stable")


class NetworkError(ValueError):
    """Report a wrong scale, size, variant, weight file or state dict, and what would be right, in one line."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a NetworkError that lists the choices if ``value`` is not one of them."""
    if value not in choices:
        raise NetworkError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_images(num_classes: int, in_channels: int, size_step: int, **sizes: int) -> None:
    """Raise a NetworkError if the number of classes, the channels or a side in pixels is not supported.

    size_step: each of ``sizes`` must be a multiple of it; the error names the nearest multiples.
    """
    if in_channels < 1:
        raise NetworkError(f"in_channels is {in_channels}; use 1 (grey), 3 (colour) or another positive number")
    if num_classes < 2:
        raise NetworkError(f"num_classes is {num_classes}; it includes background, so use at least 2")
    for name, size in sizes.items():
        if size <= 0 or size % size_step:
            below = max(size // size_step * size_step, size_step)
            choices = f"{below}" if size < size_step else f"{below} or {below + size_step}"
            raise NetworkError(f"{name} is {size}; it must be a multiple of {size_step}: the nearest is {choices}")


def check_input(x: Tensor, in_channels: int, img_size: int) -> None:
    """Raise a NetworkError if images do not have the shape (B, in_channels, img_size, img_size)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != (in_channels, img_size, img_size):
        raise NetworkError(
            f"the input has shape {tuple(x.shape)}; this network takes (B, {in_channels}, {img_size}, {img_size}): "
            "resize the images, or build the network with another img_size or in_channels"
        )


def resize(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize a map (B, C, H, W) to ``size`` bilinearly, corners not aligned. Only ``UpConv`` resizes differently."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def normalise(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) with mean 0 and variance 1 over C, H and W of each image, without parameters."""
    return F.group_norm(x, 1)


def in_full_precision(x: Tensor) -> AbstractContextManager:
    """Return a context in which no product on the device of ``x`` is rounded to half precision or TensorFloat-32.

    torch.export splits a program at every change of autocast, and torch.compile at every change of TensorFloat-32, so
    the context is empty if nothing would be rounded.
    """
    kind = x.device.type
    if kind == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        return _without_tf32()
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def _without_tf32() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def conv3x3(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return a 3x3 convolution, BatchNorm and ReLU: (B, in, H, W) to (B, out, H, W)."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class ConvBlock(nn.Sequential):
    """Apply 3x3 convolution, BatchNorm and ReLU twice: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(*conv3x3(in_channels, out_channels), *conv3x3(out_channels, out_channels))
