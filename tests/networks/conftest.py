"""Small networks, and checks in float64, shared by the tests of networks."""

import pytest
import torch

import tests.narrow  # noqa: F401, registers the narrow MaxViT with timm
from networks import SimMPNet, maxvit

NARROW = dict(model_scale="nano", img_size=64, img_size_dmwla=64, columns_per_cluster=20)
# The first is wider than the narrow MaxViT, so that blocks attend at their own width, the second is narrower.
NARROW |= dict(feature_dim=24, decoder_feature_dim=8)
"""Arguments of a network whose steps take milliseconds, under the fixture ``narrow``."""


@pytest.fixture
def narrow(monkeypatch):
    """Let the scale ``nano`` mean a MaxViT of 16 channels, and each stage of the DMW-LA encoder have few blocks."""
    monkeypatch.setitem(maxvit.SCALES, "nano", "maxvit_narrow_test")
    monkeypatch.setattr("networks.dmwla_encoder.DEPTHS", (1, 1, 2, 1))


@pytest.fixture
def tiny_network(narrow):
    """Return a maker of networks of three classes at 64 px, in evaluation mode past so many steps of training."""

    def make(steps: int = 0, warmup_iterations: int = 1, seed: int = 0, **options) -> SimMPNet:
        torch.manual_seed(seed)
        model = SimMPNet(3, warmup_iterations=warmup_iterations, **NARROW | options).train()
        for _ in range(steps):
            model(torch.rand(2, model.config["in_channels"], 64, 64))
        return model.eval()

    return make


@pytest.fixture
def double_precision():
    """Build and compute in float64: rounding must not decide which cluster, column or window is chosen."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
