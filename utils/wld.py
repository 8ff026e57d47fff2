"""W-LD, the weight-loss dynamic update of K, the number of columns that the memory renews in a step."""

import torch
from torch import Tensor


class WeightLossDynamic:
    """Sets K by how far the loss has fallen since it was last looked at.

    ``K = trunc(100 (0.5 - 0.5 (previous - current)))``, or ``default`` where that leaves [low, high]. A loss that
    falls fast keeps its memory; one that rises renews more of it. Nothing waits for the device.

    Args:
        start_epoch: the first epoch (from 1) that changes K; infinity leaves K as it is.
        default: K before that, and where the formula leaves the range.
        low, high: the range of K.
    """

    def __init__(self, start_epoch: float = 100, default: int = 50, low: int = 25, high: int = 75):
        self.start_epoch, self.default, self.low, self.high = start_epoch, default, low, high
        self.previous: Tensor | None = None

    def step(self, loss: Tensor, epoch: int) -> Tensor | None:
        """Take the next loss (scalar) and return K, int64 (), or None while K is not to change.

        The variant ``paper`` gives each epoch's mean loss, ``release`` each iteration's loss.
        """
        previous, self.previous = self.previous, loss.detach().double()
        if previous is None or epoch < self.start_epoch:
            return None
        k = torch.trunc(100 * (0.5 - 0.5 * (previous - self.previous)))
        return torch.where((k >= self.low) & (k <= self.high), k, self.default).long()

    def state_dict(self) -> dict:
        return {"previous": self.previous}

    def load_state_dict(self, state: dict) -> None:
        self.previous = state["previous"]
